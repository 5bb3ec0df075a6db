"""How far a generated wave is from the original: spectrograms of several resolutions."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kimia_infer.audio.mel import MEL_FLOOR, POWER_FLOOR, MelConfig, mel_filters

RESOLUTIONS = (512, 1024, 2048)
"""Window lengths in samples; windows overlap by three quarters."""

QUIET = 0.05
"""Mean magnitude (of speech at -50 dB) below which errors are not relative any more."""

FLOOR = 1e-3
"""Magnitude of the rounding to 16 bits, roughly; what is below is equally silent."""


def magnitudes(waves: Tensor, n_fft: int, hop: int, window: int) -> Tensor:
    """Magnitude spectrogram [batch, n_fft / 2 + 1, frames] of waves [batch, samples]."""
    spectrum = torch.stft(
        waves.float(),
        n_fft,
        hop_length=hop,
        win_length=window,
        window=_window(window, waves.device),
        center=False,
        return_complex=True,
    )
    return (torch.view_as_real(spectrum).square().sum(-1) + POWER_FLOOR).sqrt()


def log_mels(waves: Tensor, config: MelConfig) -> Tensor:
    """:func:`log_mel` of waves [batch, samples], with gradients: [batch, mel_bins, frames]."""
    edge = (config.n_fft - config.hop_size) // 2
    padded = F.pad(waves[:, None], (edge, edge), mode="reflect")[:, 0]
    found = magnitudes(padded, config.n_fft, config.hop_size, config.win_size)
    return (mel_filters(config, waves.device).T @ found).clamp(min=MEL_FLOOR).log()


def stft_loss(found: Tensor, wanted: Tensor) -> Tensor:
    """Spectral convergence plus L1 of log magnitudes, mean over resolutions, float32 [batch].

    found, wanted: waves [batch, samples], of more samples than half the longest window.
    """
    total = torch.zeros(len(found), device=found.device)
    for n_fft in RESOLUTIONS:
        both = torch.cat([found, wanted])
        both = F.pad(both[:, None].float(), (n_fft // 2, n_fft // 2), mode="reflect")[:, 0]
        guess, truth = magnitudes(both, n_fft, n_fft // 4, n_fft).chunk(2)
        distance = torch.linalg.vector_norm(truth - guess, dim=(1, 2))
        loudness = torch.linalg.vector_norm(truth, dim=(1, 2))
        convergence = distance / loudness.clamp(min=QUIET * math.sqrt(truth[0].numel()))
        logs = (truth.clamp(min=FLOOR).log() - guess.clamp(min=FLOOR).log()).abs().mean((1, 2))
        total = total + convergence + logs
    return total / len(RESOLUTIONS)


@functools.cache
def _window(size: int, device: torch.device) -> Tensor:
    return torch.hann_window(size, device=device)
