"""Training of a small Whisper-style encoder as part of a speech recognizer.

The published encoder was trained as the first half of a speech recognizer. Here a few convolutions
above it, which are not stored, recognize characters and words by CTC.

The encoder reads 30 s, most of which is silence around a short recording. To save time, several
recordings share a segment, and for most of the steps segments are shorter, at random positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from kimia_infer.audio.files import SAMPLE_RATE, load_audio
from kimia_infer.models.kimi_audio.checkpoint import WHISPER_FOLDER
from kimia_infer.models.kimi_audio.components import whisper_component
from kimia_infer.models.kimi_audio.config import FRAMES_PER_CODE, POSITIONS, encoder_config
from kimia_infer.models.kimi_audio.encoders import (
    CODE_SAMPLES,
    SEGMENT_SAMPLES,
    feature_extractor,
    segment_codes,
)
from kimia_infer.training.config import Config, Share
from kimia_infer.training.model_files import WHISPER_PREFIX
from kimia_infer.training.network import Losses
from kimia_infer.training.tasks.codec import (
    CodecNetwork,
    Data,
    load_trainable,
    mixed_precision,
    train_component,
    write_component,
)
from kimia_infer.training.tasks.config import CodecTrainingConfig
from kimia_infer.training.tasks.recognizer import (
    ConvolutionBlock,
    Units,
    check_speakable,
    ctc,
    units_of,
)
from kimia_infer.training.tasks.recordings import Example, Examples, Recording
from kimia_infer.training.trainer import TrainingResult

MELS = 128  # published configuration
MEL_PER_CODE = 8  # spectrogram frames: two per frame of the encoder, four of which a code spans
SEGMENT_CODES = segment_codes(SEGMENT_SAMPLES)
SHORT_CODES = 75
"""Length of a segment at first, in codes."""

UPPER_LAYERS = 2
"""Convolution blocks of the recognizer, above the encoder."""

DYNAMIC_RANGE = 2.0
"""From the loudest to silence in a normalized spectrogram (published: 8 decades, scaled by 4)."""


class WhisperSize(Config):
    """Sizes of a new encoder."""

    width: int = Field(96, ge=2, description="hidden size")
    layers: int = Field(2, ge=1, description="transformer layers")
    heads: int = Field(4, ge=1, description="attention heads")
    feed_forward: int = Field(256, ge=1, description="inner size of a layer")


class WhisperTrainingConfig(CodecTrainingConfig):
    """Training of the encoder of continuous features by recognizing text."""

    title: ClassVar[str] = "a small Whisper-style encoder"

    size: WhisperSize = Field(WhisperSize(), description="of new weights")
    full_from: Share = Field(
        0.8, description="share of the steps after which segments are 30 s long, as when served"
    )


def train_whisper(settings: WhisperTrainingConfig, resume: bool = False) -> TrainingResult:
    """:func:`train_component`; the result is in ``output/final/whisper-large-v3``."""
    values = new_config(settings.size)
    config = encoder_config(values, Path("size"))

    def build(data: Data, folder: Path | None, device: torch.device) -> WhisperNetwork:
        if folder is not None:
            encoder = load_trainable(whisper_component(folder), device)
        else:
            encoder = new_encoder(WhisperEncoder(config)).to(device)
        return WhisperNetwork(encoder, values, settings, units_of(data))

    read = partial(read_sound, extractor=feature_extractor(Path(), MELS))
    return train_component(settings, resume, WHISPER_FOLDER, read, build, needs_text=True)


def read_sound(sound: Recording, extractor) -> Example:
    """``mel`` fp32 [mels, 8 * codes] as in a segment of 30 s, and ``text``."""
    wave = load_audio(sound.path, max_seconds=SEGMENT_SAMPLES / SAMPLE_RATE)
    count = segment_codes(len(wave))
    check_speakable(sound.text, count)
    # Silence after the end, as in a segment; more of it changes none of these frames.
    samples = min((count + 1) * CODE_SAMPLES, SEGMENT_SAMPLES)
    found = extractor(
        wave, sampling_rate=SAMPLE_RATE, padding="max_length", max_length=samples,
        return_tensors="pt",
    )  # fmt: skip
    mel = found.input_features[0, :, : MEL_PER_CODE * count].clone()
    return {"mel": mel, "text": sound.text, "seconds": len(wave) / SAMPLE_RATE}


class Place(NamedTuple):
    """Where a recording begins: the index of its segment and of its first code there."""

    segment: int
    code: int


class WhisperNetwork(CodecNetwork):
    """Losses of recordings, several of which share a segment."""

    def __init__(
        self, encoder: WhisperEncoder, values: dict, settings: WhisperTrainingConfig, units: Units
    ):
        super().__init__()
        self.encoder, self.values, self.settings, self.units = encoder, values, settings, units
        # Late positions occur too rarely to be learned.
        encoder.embed_positions.requires_grad_(False)
        width = encoder.config.d_model
        self.upper = nn.ModuleList(ConvolutionBlock(width) for _ in range(UPPER_LAYERS))
        self.upper_norm = nn.LayerNorm(width)
        self.characters = nn.Linear(width, len(units.characters) + 1)
        self.words = nn.Linear(width, len(units.words) + 1)

    def forward(self, batch: Examples) -> Losses:
        mels = [item["mel"] for item in batch.items]
        counts = [mel.shape[1] // MEL_PER_CODE for mel in mels]
        generator = self.generator(batch)
        full = not self.training or self.progress >= self.settings.full_from
        length = SEGMENT_CODES if full else max(SHORT_CODES, *counts)
        places = arrange(counts, length, full, generator)
        first = int(torch.randint(SEGMENT_CODES - length + 1, (), generator=generator))
        with mixed_precision(self.settings, mels[0].device):
            frames = encode(self.encoder, fill_segments(mels, places, length), first)
            pieces = [
                frames[place.segment, FRAMES_PER_CODE * place.code :][: FRAMES_PER_CODE * count]
                for place, count in zip(places, counts, strict=True)
            ]
            return self._losses(batch, pieces, torch.tensor(counts, device=frames.device))

    def _losses(self, batch: Examples, pieces: list[Tensor], counts: Tensor) -> Losses:
        x = pad_sequence(pieces, batch_first=True)
        frames = torch.arange(x.shape[1], device=x.device)
        valid = (frames < FRAMES_PER_CODE * counts[:, None])[:, :, None]
        for block in self.upper:
            x = block(x, valid)
        x = self.upper_norm(x)
        texts = [item["text"] for item in batch.items]
        characters = [self.units.character_ids(text) for text in texts]
        words = [self.units.word_ids(text) for text in texts]
        scores = self.words(x.unflatten(1, (-1, FRAMES_PER_CODE)).mean(2))
        return {
            "characters": ctc(self.characters(x), FRAMES_PER_CODE * counts, characters),
            "words": ctc(scores, counts, words),
        }

    def blocks(self) -> Iterator[nn.Module]:
        yield from self.encoder.layers

    def same_run(self) -> dict[str, Tensor]:
        return {"units": self.units.mark}

    def write(self, folder: Path) -> None:
        parameters = self.encoder.named_parameters()
        tensors = {WHISPER_PREFIX + name: p.detach() for name, p in parameters}
        write_component(folder / WHISPER_FOLDER, "config.json", self.values, tensors)


def arrange(
    counts: Sequence[int], length: int, sparse: bool, generator: torch.Generator | None
) -> list[Place]:
    """Places for recordings of ``counts`` codes in segments of ``length``, with pauses.

    ``sparse`` leaves the end of each segment silent, from a random point on.
    """
    places, segment, end, limit = [], -1, 0, 0
    draws = torch.rand(2 * len(counts), generator=generator).tolist()
    for count, pause, part in zip(counts, draws[::2], draws[1::2], strict=True):
        begin = end + round(8 * pause)
        if not places or begin + count > limit:
            segment, begin = segment + 1, round(4 * pause) if count + 4 <= length else 0
            limit = max(begin + count, round(length * part)) if sparse else length
        places.append(Place(segment, begin))
        end = begin + count
    return places


def fill_segments(mels: Sequence[Tensor], places: Sequence[Place], length: int) -> Tensor:
    """Spectrograms [segments, mels, 8 * length], normalized as whole segments are."""
    segments = places[-1].segment + 1
    shape = (segments, mels[0].shape[0], MEL_PER_CODE * length)
    filled = mels[0].new_full(shape, -torch.inf)
    for mel, place in zip(mels, places, strict=True):
        begin = MEL_PER_CODE * place.code
        filled[place.segment, :, begin : begin + mel.shape[1]] = mel
    return torch.maximum(filled, filled.amax((1, 2), keepdim=True) - DYNAMIC_RANGE)


def encode(encoder: WhisperEncoder, mel: Tensor, first_code: int) -> Tensor:
    """Frames [segments, time, width] of spectrograms of any length, from a given position.

    As :meth:`WhisperEncoder.forward`, which takes 30 s only.
    """
    x = F.gelu(encoder.conv1(mel))
    x = F.gelu(encoder.conv2(x)).mT
    begin = FRAMES_PER_CODE * first_code
    x = x + encoder.embed_positions.weight[begin : begin + x.shape[1]]
    for layer in encoder.layers:
        x = layer(x, None)
    return encoder.layer_norm(x)


def new_config(size: WhisperSize) -> dict:
    """The published fields of ``config.json``."""
    return {
        "activation_function": "gelu",
        "architectures": ["WhisperForConditionalGeneration"],
        "d_model": size.width,
        "encoder_attention_heads": size.heads,
        "encoder_ffn_dim": size.feed_forward,
        "encoder_layers": size.layers,
        "max_source_positions": POSITIONS,
        "model_type": "whisper",
        "num_mel_bins": MELS,
        "scale_embedding": False,
        "torch_dtype": "float16",
    }


def new_encoder(encoder: WhisperEncoder) -> WhisperEncoder:
    """Initialize with larger values than transformers, whose suit wide layers; small positions."""
    for module in encoder.modules():
        if isinstance(module, nn.Linear | nn.Conv1d):
            module.reset_parameters()
    with torch.no_grad():
        encoder.embed_positions.weight.mul_(0.3)
    return encoder.train()
