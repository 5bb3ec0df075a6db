"""Recordings at the rate of their file, and resampling with the windowed sinc of torchaudio.

Models whose published code resamples with torchaudio get the same samples from here: torchaudio
has no release for the PyTorch that is used.
"""

from __future__ import annotations

import functools
import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kimia_infer.audio.files import SAMPLE_RATE, Check, Note, Reader, load_audio

LOBES, ROLLOFF = 6, 0.99
"""Zero crossings of the sinc on each side, and its band as a share of the lower rate: the defaults
of torchaudio."""

RATE_STEP = 25
"""All usual rates are multiples; the sinc's filters for others would be gigabytes."""
HIGHEST_RATE = 192_000
"""Hz; the filters grow with the rate, of which the header of a file may say anything."""
UNUSUAL_RATE = 48_000
"""What files at other rates are decoded to."""


def load_native(
    source: str | os.PathLike[str] | bytes,
    max_seconds: float | None = None,
    *,
    note: Note | None = None,
    check: Check | None = None,
) -> tuple[np.ndarray, int]:
    """float32 [samples] as :func:`load_audio` reads them, and the rate of the file in Hz.

    A rate that is no multiple of 25 Hz or is above 192 kHz becomes 48 kHz.
    """
    reader = Reader(source, None, SAMPLE_RATE, lambda text: None, check or (lambda: None))
    with reader.opened() as file:
        _, rate = next(iter(reader.blocks(file)), (None, SAMPLE_RATE))
    rate = UNUSUAL_RATE if rate % RATE_STEP or rate > HIGHEST_RATE else rate
    return load_audio(source, max_seconds, rate, note=note, check=check), rate


def resample(wave: Tensor, rate: int, wanted: int) -> Tensor:
    """``wave`` float32 [samples] at ``rate`` Hz -> [ceil(samples * wanted / rate)]."""
    if rate == wanted:
        return wave
    divisor = math.gcd(rate, wanted)
    before, after = rate // divisor, wanted // divisor
    filters, width = _filters(before, after, wave.device)
    padded = F.pad(wave, (width, width + before))
    pieces = F.conv1d(padded[None, None], filters, stride=before)[0]
    return pieces.T.reshape(-1)[: math.ceil(len(wave) * after / before)]


@functools.lru_cache(maxsize=8)
def _filters(before: int, after: int, device: torch.device) -> tuple[Tensor, int]:
    """A filter for each of the ``after`` outputs per ``before`` samples, and how far it reaches."""
    band = min(before, after) * ROLLOFF
    width = math.ceil(LOBES * before / band)
    with torch.inference_mode(False):
        at = torch.arange(-width, width + before, dtype=torch.float64) / before
        shifts = torch.arange(0, -after, -1, dtype=torch.float64) / after
        t = ((shifts[:, None] + at) * band).clamp(-LOBES, LOBES)
        window = torch.cos(t * (math.pi / LOBES / 2)).square()
        filters = torch.sinc(t) * window * (band / before)
        return filters.float()[:, None].to(device), width
