"""What the prosody of a recording is, in the units that Kokoro was trained on.

Pitch and energy come at 80 Hz, two values for each frame of durations. Value i is of the sound
around sample 300 i of a wave at 24 kHz (StyleTTS2).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kimia_infer.models.kokoro.config import SAMPLE_RATE

if TYPE_CHECKING:
    from swift_f0 import SwiftF0

HOP = 300
"""Samples between two values of a curve; a frame of durations is two of them."""

MELS = 80
_FFT, _WINDOW = 2048, 1200
_FLOOR = 1e-5  # of the power in a band
_FILTER_RATE = 16_000
"""StyleTTS2 leaves the rate of its mel filters at the default of torchaudio."""

FRAME_SAMPLES = 2 * HOP
_BEFORE, _BEHIND = 14, 23
"""Frames around what sounds in what Kokoro says: medians of 30 sentences, released weights."""

LOWEST, HIGHEST = 50.0, 600.0
"""Hz, between which a voice has its pitch."""

VOICED = 0.5
"""Confidence of SwiftF0 from which on there is a pitch (its documentation)."""


def curve_values(wave: np.ndarray) -> int:
    """Values of a curve of ``wave`` [samples]: two for each frame, the last of which is filled."""
    return 2 * -(-len(wave) // (2 * HOP))


@functools.cache
def _filters() -> Tensor:
    """float32 [frequencies, MELS]."""
    from transformers.audio_utils import mel_filter_bank

    with torch.inference_mode(False):
        return torch.from_numpy(
            mel_filter_bank(_FFT // 2 + 1, MELS, 0.0, _FILTER_RATE / 2, _FILTER_RATE)
        ).float()


def mel_power(wave: np.ndarray) -> Tensor:
    """float32 [values, MELS], the power in each band of ``wave`` [samples]."""
    values = curve_values(wave)
    padded = F.pad(torch.from_numpy(wave).float(), (0, values * HOP - len(wave)))
    spectrum = torch.stft(
        padded, _FFT, HOP, _WINDOW, torch.hann_window(_WINDOW), return_complex=True,
        pad_mode="constant",
    )  # fmt: skip
    return (spectrum.abs().square().T @ _filters())[:values]


def energy_of(power: Tensor) -> Tensor:
    """The energy [values] of the power in bands [values, MELS]: log of its norm."""
    return torch.log(torch.linalg.vector_norm(power + _FLOOR, dim=-1))


def sounding_frames(wave: np.ndarray) -> np.ndarray:
    """int64, the frames of ``wave`` [samples] that are not silent, in order.

    Silent is what is 35 dB below the loud parts, or nearer to the quietest parts than to these.
    """
    energy = energy_of(mel_power(wave))
    quiet, loud = energy.quantile(0.05), energy.quantile(0.95)
    limit = torch.maximum(loud - 8, quiet + 0.3 * (loud - quiet))
    return (energy >= limit).unflatten(0, (-1, 2)).any(1).nonzero()[:, 0].numpy()


def without_silence(wave: np.ndarray, sounding: np.ndarray) -> np.ndarray:
    """``wave`` [samples] with no more silence around its frames ``sounding`` than Kokoro leaves."""
    start, end = max(0, sounding[0] - _BEFORE), sounding[-1] + _BEHIND
    return wave[start * FRAME_SAMPLES : end * FRAME_SAMPLES]


@functools.cache
def _tracker() -> SwiftF0:
    from swift_f0 import SwiftF0

    return SwiftF0(threads=1)


def pitch_of(wave: np.ndarray) -> Tensor:
    """Pitch in Hz, float32 [values], of ``wave`` [samples]; 0 where there surely is none."""
    found = _tracker().detect(wave, SAMPLE_RATE, LOWEST, HIGHEST)
    times = np.arange(curve_values(wave)) * (HOP / SAMPLE_RATE)
    pitch = np.exp(np.interp(times, found.timestamps, np.log(found.pitch_hz)))
    voiced = np.interp(times, found.timestamps, found.confidence) >= VOICED
    return torch.from_numpy(pitch * voiced).float()
