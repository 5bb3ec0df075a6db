"""A wave to semantic codes: the GLM-4 speech tokenizer.

The lower half of a Whisper encoder, made block-causal, whose frames are averaged to 12.5
per second and replaced by the index of the nearest codebook vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimia_infer.audio.files import SAMPLE_RATE
from kimia_infer.models.kimi_audio.config import SIZE, check_fixed, check_kind
from kimia_infer.models.kimi_audio.whisper import (
    CODE_SAMPLES,
    FRAMES_PER_CODE,
    LENGTH_STEP,
    SEGMENT_FRAMES,
    Inputs,
    SegmentEncoder,
    encoder_config,
    feature_extractor,
)
from kimia_infer.utils.graphs import Graphs
from kimia_infer.weights.component import Component, Slot, identity_slots, read_json
from kimia_infer.weights.tensors import open_directory

if TYPE_CHECKING:
    from transformers import WhisperConfig

PADDED_TOGETHER = 128
"""Segments of a recording that are padded to the longest, as published; the last code of a shorter
one depends on its padding."""

FIXED = {
    "pooling_type": "avg",
    "pooling_kernel_size": FRAMES_PER_CODE,
    "quantize_encoder_only": True,
    "quantize_causal_encoder": False,
    "encoder_causal_convolution": True,
    "encoder_causal_attention": False,
}
"""Fields of the published configuration that select the one network implemented here."""

LEFT_OUT = {"quantize_causal_encoder": False, "encoder_causal_attention": False}
"""Values of fields that a configuration leaves out (published implementation)."""


@dataclass(frozen=True)
class SpeechTokenizerConfig:
    """The encoder dimensions, of which ``layers`` layers are used, and its quantizer.

    ``block_frames`` is the number of 20 ms frames that see each other in both directions.
    """

    encoder: WhisperConfig
    layers: int
    codebook_size: int
    block_frames: int

    @classmethod
    def from_json(cls, values: Mapping[str, Any], source: Path) -> SpeechTokenizerConfig:
        """From the fields of a published ``config.json``; ``source`` names it in errors.

        Raises:
            CheckpointError: a field is missing or selects a network that is not published.
        """
        fields = ("quantize_position", "quantize_vocab_size", "quantize_causal_block_size")
        for name in fields:
            check_kind(values.get(name), SIZE, name, source)
        position, codebook_size, block_frames = (values[name] for name in fields)
        fixed = {**FIXED, "pooling_position": position}
        check_fixed({**LEFT_OUT, **values}, fixed, source)
        return cls(encoder_config(values, source), position, codebook_size, block_frames)


class SpeechTokenizer(nn.Module):
    """Block-causal Whisper encoder with a vector quantizer. Run it in float32."""

    def __init__(self, config: SpeechTokenizerConfig):
        from transformers.models.whisper.modeling_whisper import WhisperEncoderLayer

        super().__init__()
        self.config = config
        encoder = config.encoder
        self.conv1 = nn.Conv1d(encoder.num_mel_bins, encoder.d_model, kernel_size=3)
        self.conv2 = nn.Conv1d(encoder.d_model, encoder.d_model, kernel_size=3, stride=2)
        self.embed_positions = nn.Embedding(encoder.max_source_positions, encoder.d_model)
        self.layers = nn.ModuleList(WhisperEncoderLayer(encoder) for _ in range(config.layers))
        self.codebook = nn.Embedding(config.codebook_size, encoder.d_model)

    def forward(self, mel: Tensor, mask: Tensor) -> Tensor:
        """Spectrograms to the vectors that are quantized.

        Args:
            mel: log-mel [segments, mels, frames], 100 frames per second, a multiple of 8.
            mask: [segments, frames], nonzero where a frame starts within its segment.

        Returns:
            [segments, frames / 8, d_model]; the last vector of a segment averages over
            frames of padding too, as published.
        """
        frames = F.gelu(_causal_conv(self.conv1, mel.mT))
        frames = F.gelu(_causal_conv(self.conv2, frames))
        frames = frames + self.embed_positions.weight[: frames.shape[1]]
        visible = self._visible(mask[:, :: self.conv2.stride[0]].bool())
        for layer in self.layers:
            frames = layer(frames, attention_mask=visible)
        return frames.unflatten(1, (-1, FRAMES_PER_CODE)).mean(dim=2)

    def _visible(self, valid: Tensor) -> Tensor:
        """Which key a query attends to: valid, and past or in the same block.

        [segments, frames] to [segments, 1, frames (query), frames (key)].
        """
        index = torch.arange(valid.shape[1], device=valid.device)
        block = index // self.config.block_frames
        causal = (index <= index[:, None]) | (block == block[:, None])
        return causal & valid[:, None, None, :]

    def quantize(self, vectors: Tensor) -> Tensor:
        """Indices [...] of the codebook vectors nearest to ``vectors`` [..., d_model]."""
        codebook = self.codebook.weight
        flat = vectors.flatten(0, -2)
        lengths = codebook.square().sum(dim=1) + flat.square().sum(dim=1, keepdim=True)
        distances = torch.addmm(lengths, flat, codebook.T, alpha=-2.0)
        return distances.argmin(dim=1).view(vectors.shape[:-1])


class SpeechCodes(SegmentEncoder):
    """Waves to semantic codes, int64 [codes], 12.5 per second.

    The module is a :func:`speech_tokenizer_component`. Another dtype than float32 changes some
    codes.
    """

    lengths = range(LENGTH_STEP, SEGMENT_FRAMES + 1, LENGTH_STEP)

    def __init__(self, module: SpeechTokenizer, directory: Path, graphs: Graphs | None = None):
        super().__init__(module, directory, module.config.encoder.num_mel_bins, graphs)

    def _spectrograms(self, segments: list[np.ndarray]) -> list[Inputs]:
        weight, rows = self.module.conv1.weight, []
        for first in range(0, len(segments), PADDED_TOGETHER):
            features = self.extractor(
                segments[first : first + PADDED_TOGETHER],
                sampling_rate=SAMPLE_RATE,
                padding="longest",
                pad_to_multiple_of=CODE_SAMPLES,
                return_attention_mask=True,
                return_tensors="pt",
                device=str(weight.device),
            )
            mel = features.input_features.to(weight.device, weight.dtype)
            rows += zip(mel, features.attention_mask.to(weight.device), strict=True)
        return rows

    def _blank(self, frames: int) -> Inputs:
        (mel,) = super()._blank(frames)
        return mel, torch.ones(1, frames, device=mel.device, dtype=torch.int32)

    def _compute(self, *inputs: Tensor) -> Tensor:
        return self.module.quantize(self.module(*inputs))  # masked frames do not change the codes


def _causal_conv(conv: nn.Conv1d, frames: Tensor) -> Tensor:
    """``conv`` over time without looking ahead: [batch, time, in] to [batch, time', out].

    As a matrix product, because float32 convolutions are rounded to TF32 by default on some
    devices, which changes codes.
    """
    (kernel,), (stride,) = conv.kernel_size, conv.stride
    windows = F.pad(frames, (0, 0, kernel - 1, 0)).unfold(1, kernel, stride)
    return F.linear(windows.flatten(2), conv.weight.flatten(1), conv.bias)


def speech_tokenizer_slots(config: SpeechTokenizerConfig) -> list[Slot]:
    """Every tensor of the tokenizer by its published name, without prefix."""
    with torch.device("meta"):
        return identity_slots(SpeechTokenizer(config))


def speech_tokenizer_component(directory: Path) -> Component[SpeechTokenizer]:
    """The speech tokenizer of a checkpoint folder.

    Tensors may be named without prefix or ``model.encoder.*``. What training and the upper
    layers left there (``ema_count``, ``embed_positions2``, further layers) is ignored.

    Raises:
        CheckpointError: a file or tensor is missing, damaged or of the wrong shape, or the
            configuration selects a network other than the published one.
    """
    path = directory / "config.json"
    config = SpeechTokenizerConfig.from_json(read_json(path), path)
    feature_extractor(directory, config.encoder.num_mel_bins)  # refuses a bad folder early
    return Component(
        name="speech tokenizer",
        build=lambda: SpeechTokenizer(config),
        slots=speech_tokenizer_slots(config),
        store=open_directory(directory).under("model.encoder.", ""),
    )
