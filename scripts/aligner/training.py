"""The training of the aligner, and how exact it is on voices that it never heard."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from kimia_infer.api.kokoro import Kokoro
from kimia_infer.models.kokoro.aligner import BOUNDARY, WEIGHTS_NAME, Aligner, sound_of
from kimia_infer.models.kokoro.layers import Rows
from kimia_infer.models.kokoro.measures import MELS, mel_power
from kimia_infer.training.config import TrainingConfig
from kimia_infer.training.dataset import TrainingData
from kimia_infer.training.network import Losses
from kimia_infer.training.plan import MicroBatch
from kimia_infer.training.run_directory import newest_intact
from kimia_infer.training.tasks.kokoro_recordings import read_whole
from kimia_infer.training.trainer import Trainer, TrainingResult
from kimia_infer.utils.files import replacing
from kimia_infer.utils.progress import progress
from scripts.aligner.speech import HELD_OUT, Utterance, spoken
from scripts.benchmark.phoneme_sentences import SHORT

WIDTH = 128

SMALLEST = 1e-8
"""Power in a band, which is stored as a logarithm in float16."""


@dataclass(frozen=True)
class Example:
    """``logs`` [values, MELS] of the power in bands, and the true ``durations`` of ``phonemes``."""

    name: str
    logs: Tensor
    phonemes: str
    durations: Tensor

    @classmethod
    def read(cls, path: Path) -> Example:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in ("logs", "durations")}
            return cls(path.stem, phonemes=file.metadata()["phonemes"], **tensors)


def speak_all(kokoro: Kokoro, count: int, folder: Path) -> list[Path]:
    """Files of the utterances 0 .. count - 1; those that are there are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index:05d}.safetensors" for index in range(count)]
    missing = [index for index, path in enumerate(paths) if not path.is_file()]
    for index in progress("Speaking", unit="sentences", iterable=missing):
        utterance = Utterance.drawn(index, kokoro.voices.names)
        wave, facts = spoken(kokoro, utterance)
        write_example(paths[index], wave, facts["durations"], utterance.phonemes)
    return paths


def write_example(path: Path, wave: Tensor, durations: Tensor, phonemes: str) -> None:
    logs = torch.log(mel_power(wave.numpy()) + SMALLEST).half()
    with replacing(path) as partial_path:
        save_file({"logs": logs, "durations": durations}, partial_path, {"phonemes": phonemes})


@dataclass(frozen=True)
class Batch:
    """``power`` [batch, values, MELS], ids and durations [batch, time], ``lengths`` [batch]."""

    power: Tensor
    ids: Tensor
    durations: Tensor
    lengths: Tensor
    weights: Tensor
    names: list[str]

    def to(self, device: torch.device) -> Batch:
        moved = {n: v.to(device) for n, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


@dataclass
class Examples(TrainingData):
    """Examples, joined into batches with the ids of ``aligner``."""

    items: Sequence[Example]
    aligner: Aligner
    unit = "utterance"

    def __getitem__(self, part: MicroBatch) -> Batch:
        chosen = [self.items[index] for index in part.indices]
        ids = [self.aligner.ids(example.phonemes) for example in chosen]
        return Batch(
            pad_sequence([example.logs.float().exp() for example in chosen], batch_first=True),
            pad_sequence(ids, batch_first=True),
            pad_sequence([example.durations for example in chosen], batch_first=True),
            torch.tensor([len(row) for row in ids]),
            torch.tensor(part.weights),
            [example.name for example in chosen],
        )


class AlignerNetwork(nn.Module):
    """Batches to the surprise at the place and the kind of the true symbol of each frame."""

    def __init__(self, aligner: Aligner):
        super().__init__()
        self.aligner = aligner

    def forward(self, batch: Batch) -> Losses:
        frames = batch.durations.sum(1)
        power = [p[: 2 * count] for p, count in zip(batch.power, frames.tolist(), strict=True)]
        if self.training:
            power = [disturbed(p) for p in power]
        sound = pad_sequence([sound_of(p) for p in power], batch_first=True)
        scores, kinds = self.aligner(sound, Rows(frames), batch.ids, Rows(batch.lengths))
        places = torch.arange(batch.ids.shape[1], device=scores.device)
        scores = scores.masked_fill(places >= batch.lengths[:, None, None], -1e4)
        ends = batch.durations.cumsum(1)
        times = torch.arange(scores.shape[1], device=scores.device).expand(len(scores), -1)
        truth = torch.searchsorted(ends, times.contiguous(), right=True)
        truth = truth.clamp(max=scores.shape[2] - 1)  # behind the end of a row
        inside = times < frames[:, None]
        surprise = F.cross_entropy(scores.mT, truth, reduction="none")
        symbols = F.cross_entropy(kinds.mT, batch.ids.gather(1, truth), reduction="none")
        return {
            "places": (surprise * inside).sum(1) / frames,
            "symbols": (symbols * inside).sum(1) / frames,
        }


def disturbed(power: Tensor) -> Tensor:
    """The power in bands [values, MELS] of the same speech in another room, at another microphone.

    Reverberation, stationary noise, the colour of the microphone and a limited band, all drawn.
    """
    draw = torch.rand(6).tolist()
    if draw[0] < 0.5:
        decay = 0.5 + 0.4 * draw[1]  # of 12.5 ms: 60 dB in 0.25 to 1.6 s
        share = 0.3 * torch.rand(1).item() * (1 - decay)
        tail, tails = torch.zeros(MELS), []
        for row in power:
            tail = decay * (tail + row)
            tails.append(tail)
        power = power + share * torch.stack(tails)
    level = power.sum(1).quantile(0.9) * 10 ** (-(0.5 + 5 * draw[2]))  # 5 to 55 dB below speech
    colour = _smooth_curve(3.0).exp()
    noise = level * colour / colour.sum() * torch.empty_like(power).exponential_()
    power = (power + noise) * _smooth_curve(1.0).exp()
    if draw[3] < 0.4:
        kept = int(MELS * (0.55 + 0.4 * draw[4]))  # 8 and 16 kHz recordings have no higher bands
        power = torch.cat([power[:, :kept], power[:, kept:] * 1e-5], dim=1)
    return power


def _smooth_curve(deviation: float) -> Tensor:
    """[MELS], a random curve that moves slowly over the bands."""
    points = deviation * torch.randn(1, 1, 6)
    return F.interpolate(points, MELS, mode="linear", align_corners=True)[0, 0]


class AlignerTrainingConfig(TrainingConfig):
    """Settings of the run, as the trainer wants them."""

    batch_size: int = 16
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    warmup_ratio: float = 0.05
    workers: int = 0
    eval_every: int | None = 50
    save_every: int | None = 50
    gradient_checkpointing: bool = False


def train_aligner(
    paths: Sequence[Path], output: Path, steps: int, width: int = WIDTH
) -> TrainingResult:
    """Train on stored utterances, or continue; ``output/final/aligner.safetensors`` is the result.

    The first twentieth of them is held out.
    """
    examples = [Example.read(path) for path in paths]
    symbols = BOUNDARY + "".join(sorted(set("".join(example.phonemes for example in examples))))
    settings = AlignerTrainingConfig(
        data=str(paths[0].parent), output=str(output), device="cpu", max_steps=steps
    )
    torch.manual_seed(settings.seed)
    aligner = Aligner(symbols, width)
    held = max(1, len(examples) // 20)
    network = AlignerNetwork(aligner)
    trainer = Trainer(
        settings, PartialState(cpu=True), network, Examples(examples[held:], aligner),
        Examples(examples[:held], aligner), partial(write_aligner, aligner),
        [int(example.durations.sum()) for example in examples[held:]],
    )  # fmt: skip
    checkpoint, _ = newest_intact(output)
    if checkpoint is not None:
        trainer.resume(checkpoint)
    return trainer.run()


def write_aligner(aligner: Aligner, folder: Path) -> None:
    """Write the result of a training, in float16."""
    folder.mkdir(parents=True)
    tensors = {name: value.half() for name, value in aligner.state_dict().items()}
    facts = {"symbols": aligner.symbols, "width": str(aligner.width)}
    save_file(tensors, folder / WEIGHTS_NAME, facts)


@dataclass(frozen=True)
class Measured:
    """One sentence in a voice that the aligner never heard."""

    errors: Tensor
    """int64 [symbols], of where each symbol begins, in frames."""
    fit: float
    other_fit: float
    """Of the text of another sentence."""


def measured(kokoro: Kokoro, aligner: Aligner) -> Iterator[Measured]:
    """Real sentences, dealt to the voices that were held out."""
    config = kokoro.network.config
    texts = [read_whole(text, "en-us", config, aligner.symbols) for text in SHORT]
    for index, phonemes in enumerate(texts):
        voice = HELD_OUT[index % len(HELD_OUT)]
        wave, facts = spoken(kokoro, Utterance(index, phonemes, voice, 1.0))
        power = mel_power(wave.numpy())
        found = aligner.align(power, phonemes)
        errors = (found.durations.cumsum(0) - facts["durations"].cumsum(0)).abs()[:-1]
        other = texts[index - 1][: len(power) // 2 - 2]
        yield Measured(errors, found.fit, aligner.align(power, other).fit)
