"""Log mel energies as Kaldi computes them, which older speech models were trained on."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

RATE, FRAME, HOP, FFT = 16_000, 400, 160, 512
"""Hz, and samples of a window of 25 ms, of a step of 10 ms, and of a transform."""
BINS = 80
PREEMPHASIS = 0.97
LOWEST, HIGHEST = 20.0, 8000.0  # Hz
FLOOR = torch.finfo(torch.float32).eps


def povey_window(device: torch.device) -> Tensor:
    """Kaldi's default."""
    return torch.hann_window(FRAME, periodic=False, device=device).pow(0.85)


def hamming_window(device: torch.device) -> Tensor:
    return torch.hamming_window(FRAME, periodic=False, device=device)


def frame_count(samples: int) -> int:
    """Whole windows in a wave."""
    return 0 if samples < FRAME else 1 + (samples - FRAME) // HOP


def kaldi_fbank(wave: Tensor, window: Tensor) -> Tensor:
    """float32 [frame_count, BINS] of a wave [samples] at 16 kHz, without dither.

    The mean of each window is removed and high frequencies are raised before ``window`` [FRAME].
    """
    if len(wave) < FRAME:
        return wave.new_zeros(0, BINS)
    frames = wave.unfold(0, FRAME, HOP)
    frames = frames - frames.mean(1, keepdim=True)
    before = torch.cat([frames[:, :1], frames[:, :-1]], dim=1)
    frames = (frames - PREEMPHASIS * before) * window
    power = torch.fft.rfft(F.pad(frames, (0, FFT - FRAME))).abs().square()
    return (power @ _filters(wave.device)).clamp(min=FLOOR).log()


@functools.cache
def _filters(device: torch.device) -> Tensor:
    """Weights of the frequencies in every band, float32 [FFT // 2 + 1, BINS]."""
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(
        num_frequency_bins=FFT // 2 + 1,
        num_mel_filters=BINS,
        min_frequency=LOWEST,
        max_frequency=HIGHEST,
        sampling_rate=RATE,
        norm=None,
        mel_scale="kaldi",
        triangularize_in_mel_space=True,
    )
    with torch.inference_mode(False):
        return torch.from_numpy(filters).float().to(device)
