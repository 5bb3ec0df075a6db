"""Training of an adapter of Kokoro's prosody: settings to a finished run.

Nothing after the predictor is run: what is learned are durations, pitch and energy.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor, nn

from kimia_infer.models.kokoro.adapters.config import AdapterConfig
from kimia_infer.models.kokoro.adapters.seams import attach, fingerprint
from kimia_infer.models.kokoro.adapters.store import StoredAdapter, save_adapter
from kimia_infer.models.kokoro.checkpoint import load_network
from kimia_infer.models.kokoro.layers import Rows
from kimia_infer.models.kokoro.prosody import (
    ProsodyPredictor,
    expected_durations,
    repeat_phonemes,
)
from kimia_infer.models.kokoro.voices import Voices
from kimia_infer.training.dataset import split_data
from kimia_infer.training.network import Losses
from kimia_infer.training.run_directory import MODEL, TrainingError, checkpoint_to_resume
from kimia_infer.training.tasks.kokoro_config import KokoroTrainingConfig, ProsodyWeights, is_list
from kimia_infer.training.tasks.kokoro_data import ExampleBatch, Lines, Teacher, read_lines
from kimia_infer.training.tasks.kokoro_recordings import RecordingTeacher, read_recordings
from kimia_infer.training.trainer import Trainer, TrainingResult

PITCH_UNIT = 10.0
"""Hz; pitch is compared in this unit (StyleTTS2)."""


class ImitatingNetwork(nn.Module):
    """Batches of examples to the squared errors of cells that take the place of LSTMs.

    Every cell gets what its LSTM gets in the ``teacher``, so that none waits for another.
    """

    def __init__(
        self, predictor: ProsodyPredictor, teacher: ProsodyPredictor, adapter: AdapterConfig
    ):
        super().__init__()
        self.predictor, self.seams = predictor, adapter.seams
        self._teacher = (teacher,)  # not a part of what is trained and written

    def forward(self, batch: ExampleBatch) -> Losses:
        """The error of each seam, relative to the mean square of the LSTM's outputs."""
        found = {}
        for seam, (x, rows, output) in self._heard(batch).items():
            mask = rows.mask(x.shape[1])
            assert mask is not None, "lengths are known"
            error = self.predictor.get_submodule(seam)(x, rows) - output
            square = masked_mean(output.square(), mask)
            found[seam] = masked_mean(error.square(), mask) / square
        return found

    @torch.no_grad()
    def _heard(self, batch: ExampleBatch) -> dict[str, tuple[Tensor, Rows, Tensor]]:
        """Inputs, their rows, and outputs of the teacher's LSTMs."""
        (teacher,), example, rows = self._teacher, batch.examples, batch.rows
        found: dict[str, tuple[Tensor, Rows, Tensor]] = {}

        def keep(seam: str, module: nn.Module, given: tuple[Tensor, Rows], output: Tensor) -> None:
            found[seam] = (*given, output)

        handles = [
            teacher.get_submodule(seam).register_forward_hook(partial(keep, seam))
            for seam in self.seams
        ]
        try:
            d = teacher.text_encoder(example.encoded, example.style, rows)
            if "lstm" in self.seams:
                teacher.lstm(d, rows)
            if "shared" in self.seams:
                longest = int(example.durations.sum(1).max())
                teacher.shared(repeat_phonemes(d, example.durations, longest), batch.frames)
        finally:
            for handle in handles:
                handle.remove()
        return found


class ProsodyNetwork(nn.Module):
    """Batches of examples to losses, through a predictor with an adapter."""

    def __init__(
        self, predictor: ProsodyPredictor, adapter: AdapterConfig, weights: ProsodyWeights
    ):
        super().__init__()
        self.predictor = predictor
        self.weights = weights
        self._changes_durations = set(adapter.seams) != {"shared"}
        self._changes_curves = set(adapter.seams) != {"lstm"}

    def forward(self, batch: ExampleBatch) -> Losses:
        """Means over what belongs to each row; zeros for what the adapter cannot change."""
        example, rows, weights = batch.examples, batch.rows, self.weights
        d = self.predictor.text_encoder(example.encoded, example.style, rows)
        zero = d.new_zeros(len(d))
        found = dict.fromkeys(("logits", "durations", "pitch", "energy", "encoded"), zero)
        symbols = rows.mask(d.shape[1])
        assert symbols is not None, "lengths are known"
        if self._changes_durations:
            logits = self.predictor.durations(d, rows)
            surprise = divergence(logits, example.logits)
            found["logits"] = weights.logits * masked_mean(surprise, symbols)
            taught = expected_durations(example.logits)
            distance = (expected_durations(logits) - taught).abs()[..., None]
            found["durations"] = weights.durations * masked_mean(distance, symbols)
        if self._changes_durations and example.d is not None:
            error = (d[..., : example.d.shape[-1]] - example.d).square()
            found["encoded"] = weights.encoded * masked_mean(error, symbols)
        if self._changes_curves:
            frames = batch.frames
            repeated = repeat_phonemes(d, example.durations, example.pitch.shape[1] // 2)
            pitch, energy = self.predictor.curves(repeated, example.style, frames)
            halves = frames.times(2).mask(pitch.shape[1])
            assert halves is not None, "lengths are known"
            distance = F.smooth_l1_loss(
                pitch / PITCH_UNIT, example.pitch / PITCH_UNIT, reduction="none"
            )
            found["pitch"] = weights.pitch * masked_mean(distance[..., None], halves)
            distance = F.smooth_l1_loss(energy, example.energy, reduction="none")
            found["energy"] = weights.energy * masked_mean(distance[..., None], halves)
        return found


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean of each row of x [batch, time, channels] where mask [batch, time, 1]: [batch]."""
    return (x * mask).sum((1, 2)) / (mask.sum((1, 2)) * x.shape[-1])


def divergence(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy of logits against target logits, less what it is for equal ones."""
    share = torch.sigmoid(target)
    least = F.binary_cross_entropy_with_logits(target, share, reduction="none")
    return F.binary_cross_entropy_with_logits(logits, share, reduction="none") - least


def train_kokoro(settings: KokoroTrainingConfig, resume: bool = False) -> TrainingResult:
    """Run or, with ``resume``, continue a training; the adapter is in ``output/final``.

    Raises:
        ConfigurationError, DataError, CheckpointError, RequestError, TrainingError: what is wrong
            with the settings, the data, the model, the voices or the run.
    """
    checkpoint = checkpoint_to_resume(settings, resume)
    state = PartialState(cpu=settings.device == "cpu")
    if state.num_processes > 1:
        raise TrainingError("an adapter is trained by one process; start it without a launcher")
    assert state.device is not None
    directory = Path(settings.model)
    network = load_network(directory, state.device)
    base = fingerprint(network.predictor)
    if checkpoint is not None and StoredAdapter.read(checkpoint / MODEL).base != base:
        raise TrainingError(f"{checkpoint}: of another model than {directory}; name that one")
    voices = Voices(directory, 2 * network.config.style_dim)
    for voice in (*settings.voices, *filter(None, [settings.teacher_voice])):
        voices.style(voice, 1)
    room = settings.cache_gigabytes * 2**30

    def read(data: str | None) -> Lines:
        if data is not None and is_list(data):
            spoken = read_recordings(settings, data, network.config)
            return Lines(spoken, RecordingTeacher(network, voices), room)
        teacher = Teacher(network, voices, settings.teacher_voice)
        return Lines(read_lines(settings, data, network.config), teacher, room)

    samples, validation = split_data(settings, read)
    predictor = copy.deepcopy(network.predictor)
    attach(predictor, settings.adapter, settings.seed)
    write = partial(
        save_adapter,
        predictor=predictor,
        config=settings.adapter,
        base=base,
        model=settings.model,
    )
    student: nn.Module = ProsodyNetwork(predictor, settings.adapter, settings.weights)
    if settings.objective == "outputs":
        student = ImitatingNetwork(predictor, network.predictor, settings.adapter)
    trainer = Trainer(settings, state, student, samples, validation, write, samples.lengths)
    if checkpoint is not None:
        trainer.resume(checkpoint)
    return trainer.run()
