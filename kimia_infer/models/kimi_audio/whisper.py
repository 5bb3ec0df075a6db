"""A wave to the continuous features that accompany its codes: the Whisper encoder.

Both audio encoders read segments of 30 seconds and give one vector, or one code, for every 80 ms
begun. The counts follow from the number of samples alone, so that the length of a prompt is known
before an encoder runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kimia_infer.audio.files import SAMPLE_RATE
from kimia_infer.models.kimi_audio.config import SIZE, check_fixed, check_kind
from kimia_infer.utils.errors import CheckpointError
from kimia_infer.utils.graphs import Graphs, Recorded, graphs_for
from kimia_infer.weights.component import Component, Slot, identity_slots, read_json
from kimia_infer.weights.tensors import TensorStore, open_directory

if TYPE_CHECKING:  # importing transformers takes seconds, so it waits until an encoder is built
    from transformers import WhisperConfig, WhisperFeatureExtractor
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

SEGMENT_SAMPLES = 30 * SAMPLE_RATE
"""Samples of one encoder input (published configuration: 30 s chunks)."""

CODE_SAMPLES = 1_280
"""Samples per code: mel hop 160, second convolution 2, pooling 4; 12.5 codes a second."""


SEGMENT_FRAMES = SEGMENT_SAMPLES // 160
"""Mel frames of a segment."""

LENGTH_STEP = 200
"""Spectrograms are batched and recorded by multiples of these 2 s, which divide a segment."""

BATCH_SEGMENTS = 4
"""Segments that a device encodes at once. Four have 6,000 frames; more would keep it no busier and
take memory from requests (0.37 GB at the published size)."""

EAGER_FRAMES = 4000
"""Mel frames, padding included, that are encoded at once where operations are launched one by one.
With more of them the activations leave the caches of a CPU, where one segment of 30 s at a time is
fastest."""

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


FRAMES_PER_CODE = 4
"""Encoder frames (50 per second) joined to one feature vector (12.5 per second)."""

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

POSITIONS = 1_500
"""Encoder frames of a segment (published configuration)."""

ENCODER_SIZES = (
    "d_model",
    "encoder_layers",
    "encoder_attention_heads",
    "encoder_ffn_dim",
    "num_mel_bins",
)
ENCODER_FIXED = {"max_source_positions": POSITIONS, "activation_function": "gelu"}


def encoder_config(values: Mapping[str, Any], source: Path) -> WhisperConfig:
    """The encoder that a published ``config.json`` describes, without dropout, with SDPA.

    Raises:
        CheckpointError: a field is missing or has a wrong value; ``source`` is named.
    """
    for name in ENCODER_SIZES:
        check_kind(values.get(name), SIZE, name, source)
    check_fixed({**ENCODER_FIXED, **values}, ENCODER_FIXED, source)  # both may be left out
    if values["d_model"] % values["encoder_attention_heads"]:
        raise CheckpointError(f"{source}: d_model is not a multiple of encoder_attention_heads")
    from transformers import WhisperConfig

    return WhisperConfig(
        **{name: values[name] for name in ENCODER_SIZES},
        **ENCODER_FIXED,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        encoder_layerdrop=0.0,
        attn_implementation="sdpa",  # pyrefly: ignore[unexpected-keyword]
    )


def feature_extractor(directory: Path, mels: int) -> WhisperFeatureExtractor:
    """Waves to log-mel spectrograms with ``mels`` bands, as both encoders expect them.

    A ``preprocessor_config.json`` can only confirm the published settings, so a folder may
    do without.

    Raises:
        CheckpointError: that file asks for another spectrogram.
    """
    settings = {"feature_size": mels, **LOG_MEL}
    path = directory / "preprocessor_config.json"
    if path.is_file():
        check_fixed({**LOG_MEL, **read_json(path)}, settings, path)
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(**settings)


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

    Computed in the dtype of the module, a :func:`whisper_component`, from float32 spectrograms.
    Each segment is padded with silence, which is attended to, as published.
    """

    lengths = (SEGMENT_FRAMES,)

    def __init__(self, module: WhisperEncoder, directory: Path, graphs: Graphs | None = None):
        super().__init__(module, directory, module.config.num_mel_bins, graphs)

    def _spectrograms(self, segments: list[np.ndarray]) -> list[Inputs]:
        weight = self.module.conv1.weight
        mel = self.extractor(
            segments, sampling_rate=SAMPLE_RATE, return_tensors="pt", device=str(weight.device)
        ).input_features
        return [(row,) for row in mel.to(weight.device, weight.dtype)]

    def _compute(self, *inputs: Tensor) -> Tensor:
        frames = self.module(*inputs).last_hidden_state
        return frames.unflatten(1, (-1, FRAMES_PER_CODE)).flatten(2)


def whisper_slots(config: WhisperConfig) -> list[Slot]:
    """Every tensor of the encoder, by its published name without ``model.encoder.``."""
    with torch.device("meta"):
        return identity_slots(_build(config))


def _build(config: WhisperConfig) -> WhisperEncoder:
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    return WhisperEncoder(config)


def whisper_component(
    directory: Path, tuned: TensorStore | None = None
) -> Component[WhisperEncoder]:
    """The Whisper encoder of a checkpoint folder; its decoder is ignored.

    Tensors may be named ``model.encoder.*``, as published, or ``encoder.*``, as exported
    after fine-tuning. ``tuned`` holds those of an encoder that was fine-tuned with the language
    model, which are then used; the folder need not exist. Without a ``config.json`` its
    sizes are taken from the tensors.

    Raises:
        CheckpointError: a file or tensor is missing, damaged or of the wrong shape.
    """
    path = directory / "config.json"
    store = tuned or open_directory(directory).under("model.encoder.", "encoder.")
    values = read_json(path) if path.is_file() else _sizes(store, path)
    config = encoder_config(values, path)
    feature_extractor(directory, config.num_mel_bins)  # refuses a bad folder before loading
    return Component(
        name="Whisper encoder",
        build=lambda: _build(config),
        slots=whisper_slots(config),
        store=store,
    )


def _sizes(store: TensorStore, missing: Path) -> dict[str, int]:
    """Sizes that the tensors imply; heads have 64 dimensions, as in all published encoders."""
    shapes = {name: stored.shape for name, stored in store.tensors.items()}
    try:
        width, mels, _ = shapes["conv1.weight"]
        inner, _ = shapes["layers.0.fc1.weight"]
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{store.location}: not a Whisper encoder ({error})") from error
    if width % 64:
        raise CheckpointError(
            f"{missing}: file missing, and a width of {width} leaves the number of heads open"
        )
    layers = {name.split(".")[1] for name in shapes if name.startswith("layers.")}
    return {
        "d_model": width,
        "encoder_layers": len(layers),
        "encoder_attention_heads": width // 64,
        "encoder_ffn_dim": inner,
        "num_mel_bins": mels,
    }
