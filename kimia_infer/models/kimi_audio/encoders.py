"""Waves to what the model hears: continuous Whisper features, and speech codes beside them.

Both encoders read segments of up to 30 seconds and give one vector, or one code, for every 80 ms
begun.
The counts follow from the number of samples alone, so that the length of a prompt is known before
an encoder runs. The codes are those of the GLM-4 speech tokenizer: the lower half of a Whisper
encoder, made block-causal, whose frames are averaged to 12.5 per second and replaced by the index
of the nearest codebook vector.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimia_infer.audio.files import SAMPLE_RATE
from kimia_infer.models.kimi_audio.config import (
    FRAMES_PER_CODE,
    SpeechTokenizerConfig,
    check_fixed,
)
from kimia_infer.utils.errors import CheckpointError
from kimia_infer.utils.graphs import Graphs, Recorded, graphs_for
from kimia_infer.weights.component import read_json

if TYPE_CHECKING:  # importing transformers takes seconds, so it waits until an encoder is built
    from transformers import WhisperFeatureExtractor
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

SEGMENT_SAMPLES = 30 * SAMPLE_RATE
"""Samples of one encoder input (published configuration: 30 s chunks)."""

CODE_SAMPLES = 1_280
"""Samples per code: mel hop 160, second convolution 2, pooling 4; 12.5 codes a second."""

SEGMENT_FRAMES = SEGMENT_SAMPLES // 160
"""Mel frames of a segment."""

LENGTH_STEP = 200
"""Spectrograms are batched and recorded by multiples of these 2 s, which divide a segment."""

STEPPED_LENGTHS = range(LENGTH_STEP, SEGMENT_FRAMES + 1, LENGTH_STEP)

BATCH_SEGMENTS = 4
"""Segments that a device encodes at once. Four have 6,000 frames; more would keep it no busier and
take memory from requests (0.37 GB at the published size)."""

EAGER_FRAMES = 4000
"""Mel frames, padding included, that are encoded at once where operations are launched one by one.
With more of them the activations leave the caches of a CPU, where one segment of 30 s at a time is
fastest."""

PADDED_TOGETHER = 128
"""Segments of a recording that are padded to the longest, as published; the last code of a shorter
one depends on its padding."""

LOG_MEL = {
    "sampling_rate": SAMPLE_RATE,
    "chunk_length": SEGMENT_SAMPLES // SAMPLE_RATE,
    "n_fft": 400,
    "hop_length": 160,
    "padding_side": "right",
    "padding_value": 0.0,
    "dither": 0.0,
}
"""Spectrogram settings of both audio encoders (published configuration). Lengths of
prompts follow from them, so a checkpoint cannot choose others."""

PADDING_FIELD = "padding_seconds"
"""Field of a Whisper encoder's ``preprocessor_config.json``: seconds of silence after a segment, at
least. Without it segments are padded to 30 s, as published."""

Inputs = tuple[Tensor, ...]


def as_samples(wave: np.ndarray | Tensor) -> np.ndarray:
    """``wave`` as a float32 array [samples] on the host; ValueError if it is anything else."""
    if isinstance(wave, Tensor):
        wave = wave.detach().cpu()
        wave = (wave.float() if wave.is_floating_point() else wave).numpy()
    if wave.ndim != 1 or wave.size == 0 or not np.issubdtype(wave.dtype, np.floating):
        raise ValueError(
            "wave must be floating point samples of shape [samples], at least one, at "
            f"{SAMPLE_RATE} Hz; got {wave.dtype} of shape {list(wave.shape)}"
        )
    return wave.astype(np.float32, copy=False)


def split_segments(wave: np.ndarray) -> list[np.ndarray]:
    """Cut [samples] into pieces of 30 s; only the last may be shorter, and none is empty."""
    return [wave[start : start + SEGMENT_SAMPLES] for start in range(0, len(wave), SEGMENT_SAMPLES)]


def segment_codes(samples: int) -> int:
    """Codes of one segment: every 80 ms begun counts."""
    return (samples - 1) // CODE_SAMPLES + 1


def code_count(samples: int) -> int:
    """Codes, and continuous feature vectors, of a 16 kHz wave of ``samples`` samples."""
    if samples < 1:
        raise ValueError(f"a wave needs at least one sample, got {samples}")
    full, rest = divmod(samples, SEGMENT_SAMPLES)
    return full * segment_codes(SEGMENT_SAMPLES) + (segment_codes(rest) if rest else 0)


def feature_extractor(directory: Path, mels: int) -> WhisperFeatureExtractor:
    """Waves to log-mel spectrograms with ``mels`` bands, as both encoders expect them.

    A ``preprocessor_config.json`` can only confirm the published settings and name the padding of
    Whisper features, so a folder may do without.

    Raises:
        CheckpointError: that file asks for another spectrogram, or its padding is no number.
    """
    settings = {"feature_size": mels, **LOG_MEL}
    path, padding = directory / "preprocessor_config.json", None
    if path.is_file():
        values = read_json(path)
        check_fixed({**LOG_MEL, **values}, settings, path)
        padding = values.get(PADDING_FIELD)
        if padding is not None and not (type(padding) in (int, float) and 0 <= padding <= 30):
            raise CheckpointError(f"{path}: {PADDING_FIELD} must be 0 to 30 s, not {padding!r}")
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(**settings, **{PADDING_FIELD: padding})


def whisper_spectrograms(
    extractor: WhisperFeatureExtractor, segments: Sequence[np.ndarray], device: str = "cpu"
) -> list[Tensor]:
    """Log-mel float32 [mels, frames] of each segment [samples], padded as Whisper reads it.

    ``frames`` is a multiple of ``LENGTH_STEP``, so that segments of any length can be batched.
    """
    padding = getattr(extractor, PADDING_FIELD)
    rows = []
    for segment in segments:
        frames = SEGMENT_FRAMES
        if padding is not None:
            needed = len(segment) / SAMPLE_RATE + padding
            frames = min(frames, _rounded(math.ceil(100 * needed)))
        found = extractor(
            segment, sampling_rate=SAMPLE_RATE, padding="max_length", max_length=160 * frames,
            return_tensors="pt", device=device,
        )  # fmt: skip
        rows.append(found.input_features[0])
    return rows


def whisper_frames(encoder: WhisperEncoder, mel: Tensor) -> Tensor:
    """Frames [segments, time, d_model] of spectrograms [segments, mels, 2 * time] of up to 30 s.

    transformers' own forward takes 30 s only.
    """
    if mel.shape[2] == SEGMENT_FRAMES:
        return encoder(mel).last_hidden_state
    x = F.gelu(encoder.conv2(F.gelu(encoder.conv1(mel)))).mT
    x = x + encoder.embed_positions.weight[: x.shape[1]]
    for layer in encoder.layers:
        x = layer(x, None)
    return encoder.layer_norm(x)


class SegmentEncoder(ABC):
    """Encodes audio in segments of 30 s, those of several recordings together.

    Segments do not see each other. Those whose spectrograms round up to the same multiple of
    ``LENGTH_STEP`` frames make a batch.

    Args:
        module: the loaded network.
        directory: its checkpoint folder, for the settings of the spectrogram.
        mels: bands of the spectrogram.
        graphs: how the network is launched; by default chosen by its device.

    Within the context ``placed()`` the parameters are where they are computed with.
    """

    lengths: Sequence[int]
    """Frames of a spectrogram that are recorded, one segment at a time; several keep a device busy
    without."""

    def __init__(self, module: Any, directory: Path, mels: int, graphs: Graphs | None):
        self.module = module
        self.extractor = feature_extractor(directory, mels)
        self.graphs = graphs or graphs_for(module.conv1.weight.device)
        self.placed: Callable[[], AbstractContextManager] = nullcontext
        self._network = Recorded(self._compute, self.graphs)

    def encode(self, wave: np.ndarray | Tensor) -> Tensor:
        """What the segments of a 16 kHz wave [samples] give, joined: [codes, ...].

        A segment gives ``(samples - 1) // 1280 + 1`` codes or vectors, on the device of the module.
        """
        return self.encode_all([wave])[0]

    @torch.no_grad()
    def encode_all(self, waves: Sequence[np.ndarray | Tensor]) -> list[Tensor]:
        """What :meth:`encode` gives for each wave."""
        cut = [split_segments(as_samples(wave)) for wave in waves]
        counts = [[segment_codes(len(segment)) for segment in segments] for segments in cut]
        with self.placed():
            rows = [row for segments in cut for row in self._spectrograms(segments)]
            found: dict[int, Tensor] = {}
            for batch in self._batches([row[0].shape[1] for row in rows]):
                given = self._stacked([rows[place] for place in batch])
                found.update(zip(batch, self._network(*given), strict=True))
        places = iter(range(len(rows)))
        return [torch.cat([found[next(places)][:n] for n in codes]) for codes in counts]

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """The places of the spectrograms that are encoded together, by their frames."""
        groups: dict[int, list[int]] = {}
        for place, frames in enumerate(lengths):
            groups.setdefault(_rounded(frames), []).append(place)
        for frames, places in groups.items():
            rows = BATCH_SEGMENTS if self.graphs.captures else max(1, EAGER_FRAMES // frames)
            yield from (places[first : first + rows] for first in range(0, len(places), rows))

    def _stacked(self, rows: Sequence[Inputs]) -> Inputs:
        """Inputs of a batch, padded with zeros; to a recorded length where that is needed."""
        frames = max(row[0].shape[1] for row in rows)
        if self.graphs.captures:
            frames = _rounded(frames)
        return tuple(
            torch.stack([F.pad(part, (0, frames - part.shape[-1])) for part in parts])
            for parts in zip(*rows, strict=True)
        )

    @torch.no_grad()
    def warm_up(self) -> None:
        """Record what is recorded, so that no request has to wait for it."""
        for frames in self.lengths:
            self._network.record(*self._blank(frames))

    @abstractmethod
    def _spectrograms(self, segments: list[np.ndarray]) -> list[Inputs]:
        """What the network reads of each segment of one recording; [mels, frames] comes first."""

    def _blank(self, frames: int) -> Inputs:
        """Inputs of one segment of so many frames."""
        weight = self.module.conv1.weight
        shape = (1, weight.shape[1], frames)
        return (torch.zeros(shape, device=weight.device, dtype=weight.dtype),)

    @abstractmethod
    def _compute(self, *inputs: Tensor) -> Tensor:
        """The codes or vectors [segments, codes, ...] of a batch; those of padding come last."""


def _rounded(frames: int) -> int:
    return -(-frames // LENGTH_STEP) * LENGTH_STEP


class WhisperFeatures(SegmentEncoder):
    """Whisper encoder frames, joined to one continuous vector [4 * d_model] per semantic code.

    Computed in the dtype of the module, from float32 spectrograms. Each segment is padded with
    silence, which is attended to: to 30 s as published, or by what the checkpoint says
    (``PADDING_FIELD``).
    """

    def __init__(self, module: WhisperEncoder, directory: Path, graphs: Graphs | None = None):
        super().__init__(module, directory, module.config.num_mel_bins, graphs)
        whole = getattr(self.extractor, PADDING_FIELD) is None
        self.lengths = (SEGMENT_FRAMES,) if whole else STEPPED_LENGTHS

    def _spectrograms(self, segments: list[np.ndarray]) -> list[Inputs]:
        weight = self.module.conv1.weight
        rows = whisper_spectrograms(self.extractor, segments, str(weight.device))
        return [(row.to(weight.device, weight.dtype),) for row in rows]

    def _compute(self, *inputs: Tensor) -> Tensor:
        frames = whisper_frames(self.module, *inputs)
        return frames.unflatten(1, (-1, FRAMES_PER_CODE)).flatten(2)


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


def _causal_conv(conv: nn.Conv1d, frames: Tensor) -> Tensor:
    """``conv`` over time without looking ahead: [batch, time, in] to [batch, time', out].

    As a matrix product, because float32 convolutions are rounded to TF32 by default on some
    devices, which changes codes.
    """
    (kernel,), (stride,) = conv.kernel_size, conv.stride
    windows = F.pad(frames, (0, 0, kernel - 1, 0)).unfold(1, kernel, stride)
    return F.linear(windows.flatten(2), conv.weight.flatten(1), conv.bias)


class SpeechCodes(SegmentEncoder):
    """Waves to semantic codes, int64 [codes], 12.5 per second.

    The module is a :class:`SpeechTokenizer`. Another dtype than float32 changes some
    codes.
    """

    lengths = STEPPED_LENGTHS

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
