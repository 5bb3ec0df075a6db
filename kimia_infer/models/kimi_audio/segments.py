"""How a wave is cut for the encoders, and how many codes it becomes.

Both audio encoders look at 30 seconds at a time and give one vector, or one code, for
every 80 ms begun. The counts follow from the number of samples alone, so that the length
of a prompt is known before an encoder runs.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from kimia_infer.audio.decode import SAMPLE_RATE

SEGMENT_SAMPLES = 30 * SAMPLE_RATE
"""Samples of one encoder input (published configuration: 30 s chunks)."""

CODE_SAMPLES = 1_280
"""Samples per code: mel hop 160, second convolution 2, pooling 4; 12.5 codes a second."""


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
