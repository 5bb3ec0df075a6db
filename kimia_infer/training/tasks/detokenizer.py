"""Training of the detokenizer's velocity network on recordings and their speech codes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from kimia_infer.audio.mel import MelConfig, log_mel
from kimia_infer.data.conversations import DataError
from kimia_infer.models.kimi_audio.checkpoint import (
    DETOKENIZER_FOLDER,
    SPEECH_TOKENIZER_FOLDER,
    VOCODER_FOLDER,
)
from kimia_infer.models.kimi_audio.config import DiTConfig, SpeechTokenizerConfig
from kimia_infer.models.kimi_audio.dit import DiT, dit_component
from kimia_infer.models.kimi_audio.flow import StreamConfig
from kimia_infer.training.network import Losses
from kimia_infer.training.samples import LazySpeechCodes
from kimia_infer.training.tasks.codec import (
    AveragedNetwork,
    Data,
    load_trainable,
    mixed_precision,
    train_component,
    write_component,
)
from kimia_infer.training.tasks.config import DetokenizerTrainingConfig, DiTSize
from kimia_infer.training.tasks.flow_matching import FlowMatcher, chunk_layout, draw_chunks
from kimia_infer.training.tasks.recordings import Example, Examples, Recording, Recordings
from kimia_infer.training.trainer import TrainingResult
from kimia_infer.weights.component import read_json


def train_detokenizer(settings: DetokenizerTrainingConfig, resume: bool = False) -> TrainingResult:
    """:func:`train_component`; the result is in ``output/final/audio_detokenizer``."""
    reader = RecordingReader(Path(settings.model))

    def build(data: Data, folder: Path | None, device: torch.device) -> DetokenizerNetwork:
        if folder is not None:
            dit = load_trainable(dit_component(folder), device)
            config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        else:
            config = new_config(settings, data[0], reader)
            dit = new_dit(DiTConfig.from_dict(config)).to(device)
        found, wanted = (dit.config.codes, dit.config.mel_bins), (reader.codes, reader.mel.mel_bins)
        if found != wanted:
            raise DataError(
                f"{folder or 'size'}: made for {found[0]} codes and {found[1]} mel bins, model has "
                f"{wanted[0]} and {wanted[1]}"
            )
        return DetokenizerNetwork(dit, config, settings)

    return train_component(settings, resume, DETOKENIZER_FOLDER, reader.read, build)


class RecordingReader:
    """Recordings to mel frames and codes.

    ``model`` is a directory with ``glm-4-voice-tokenizer`` and ``vocoder/config.json``.
    """

    def __init__(self, model: Path):
        folder = model / SPEECH_TOKENIZER_FOLDER
        path = folder / "config.json"
        self.codes = SpeechTokenizerConfig.from_json(read_json(path), path).codebook_size
        self.mel = MelConfig.from_directory(model / VOCODER_FOLDER)
        self.code_samples = StreamConfig().frames_per_code * self.mel.hop_size
        self._encode = LazySpeechCodes(folder)

    def read(self, recording: Recording) -> Example:
        """``mel`` fp32 [4 * codes, mel_bins] and ``codes`` int64 [codes] of a recording."""
        wave = torch.from_numpy(recording.load(self.mel.sample_rate))
        if recording.codes is None:
            codes = self._encode(recording.load())
        elif max(recording.codes) >= self.codes:
            raise DataError(f"codes: {max(recording.codes)} is not below {self.codes}")
        else:
            codes = torch.tensor(recording.codes)
        count = min(len(codes), len(wave) // self.code_samples)
        if count == 0:
            raise DataError(
                f"{recording.path}: {len(wave)} samples, at least {self.code_samples} are needed"
            )
        if abs(len(codes) - len(wave) / self.code_samples) > 2:
            raise DataError(
                f"codes: {len(codes)}, but the recording is as long as "
                f"{len(wave) / self.code_samples:.1f} codes"
            )
        frames = log_mel(wave, self.mel)[: count * StreamConfig().frames_per_code]
        seconds = len(wave) / self.mel.sample_rate
        return {"mel": frames, "codes": codes[:count], "seconds": seconds}


class DetokenizerNetwork(AveragedNetwork[FlowMatcher]):
    """Random crops of recordings to losses; the average of the weights is validated and written."""

    def __init__(self, dit: DiT, config: dict, settings: DetokenizerTrainingConfig):
        super().__init__(FlowMatcher(dit), settings.average)
        self.config, self.settings = config, settings
        per_second = 50 / self.trained.stream.frames_per_code
        self.shortest = math.ceil(settings.min_chunk * per_second)
        self.longest = max(self.shortest, int(settings.max_chunk * per_second))

    def forward(self, batch: Examples) -> Losses:
        generator, settings = self.generator(batch), self.settings
        mel, codes, lengths = self._crops(batch, generator)
        chunks = draw_chunks(
            codes.shape[1], self.shortest, self.longest, settings.look_ahead_codes, generator
        )
        layout = chunk_layout(chunks, self.trained.past_codes)
        dropped = torch.rand(len(mel), generator=generator) < settings.condition_dropout
        dropped = dropped.to(mel.device) & self.training
        with mixed_precision(settings, mel.device):
            return {"flow": self.module.loss(mel, codes, lengths, layout, dropped, generator)}

    def _crops(
        self, batch: Examples, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normalized mel, codes and lengths of a random piece of every recording, padded."""
        repeat, config = self.trained.stream.frames_per_code, self.trained.dit.config
        mels, pieces = [], []
        for item in batch.items:
            length = min(len(item["codes"]), self.settings.crop_codes)
            last = len(item["codes"]) - length
            start = int(torch.randint(0, last + 1, (), generator=generator))
            pieces.append(item["codes"][start : start + length])
            mels.append(item["mel"][start * repeat : (start + length) * repeat])
        mel = (pad_sequence(mels, batch_first=True) - config.mel_mean) / config.mel_std
        lengths = torch.tensor([len(piece) for piece in pieces], device=mel.device)
        return mel, pad_sequence(pieces, batch_first=True), lengths

    def blocks(self) -> Iterator[nn.Module]:
        yield from self.trained.dit.blocks

    def write(self, folder: Path) -> None:
        tensors = {f"speech_model.{n.removeprefix('dit.')}": t for n, t in self.means().items()}
        write_component(folder / DETOKENIZER_FOLDER, "config.yaml", self.config, tensors)


def new_config(
    settings: DetokenizerTrainingConfig, samples: Recordings, reader: RecordingReader
) -> dict:
    """The published structure of ``config.yaml``, with the statistics of the training data."""
    mean, std = mel_statistics(samples)
    dit = dit_values(settings.size, reader.codes, reader.mel.mel_bins) | {
        "chunk_params": {
            "hz": 50,
            "max_chunk": settings.max_chunk,
            "min_chunk": settings.min_chunk,
        },
    }
    return {"mel_mean": mean, "mel_std": std, "normalize_mel": True, "model": {"dit": dit}}


def dit_values(size: DiTSize, codes: int, mel_bins: int) -> dict:
    """The published fields of the velocity network."""
    positions = StreamConfig().position_limit
    return {
        "condition_type": "discrete_codes",
        "depth": size.depth,
        "ffn_act_layer": "gleu_tanh",
        "ffn_gated_glu": False,
        "ffn_type": "vanilla_mlp",
        "hidden_size": size.width,
        "input_size": mel_bins,
        "max_seq_len": positions,
        "mlp_ratio": size.mlp_ratio,
        "num_heads": size.heads,
        "position_embedding_type": "skip",
        "rope_params": {
            "max_position_embeddings": positions,
            "rope_base": 10000.0,
            "rope_interpolation_factor": 1.0,
        },
        "semantic_vocab_size": codes,
        "use_rope": True,
    }


def mel_statistics(samples: Recordings) -> tuple[float, float]:
    """Mean and standard deviation of all mel values, summed in float64."""
    count, total, squares = 0, 0.0, 0.0
    for recording in samples.items:
        mel = samples.example(recording)["mel"].double()
        count += mel.numel()
        total += mel.sum().item()
        squares += mel.square().sum().item()
    mean = total / count
    return mean, max(math.sqrt(max(squares / count - mean**2, 0.0)), 1e-3)


def new_dit(config: DiTConfig) -> DiT:
    """Untrained: every block begins as the identity, and every velocity as zero."""
    dit = DiT(config)
    nn.init.normal_(dit.semantic_token_embedding.weight, std=0.02)
    blocks: list[Any] = list(dit.blocks)
    zero = [block.adaLN_modulation[1] for block in blocks]
    final: Any = dit.final_layer
    for layer in [*zero, final.adaLN_modulation[1], final.linear]:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return dit
