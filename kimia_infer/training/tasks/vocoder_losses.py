"""How far a generated wave is from the original: spectrograms, and discriminators."""

from __future__ import annotations

import functools
import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

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


PERIODS = (2, 3, 5, 7, 11)
"""In samples; a discriminator for each sees a wave folded to this width."""

SPECTRA = (512, 1024)
"""Window lengths; a discriminator for each sees a spectrogram."""

SLOPE = 0.1  # of the leaky rectifiers

Scores = tuple[Tensor, list[Tensor]]


class Discriminator(nn.Module):
    """Strided convolutions over an image [batch, 1, height, width], and what they find."""

    def __init__(self, kernel: tuple[int, int], stride: tuple[int, int], channels: int):
        super().__init__()
        widths = (1, channels, 2 * channels, 4 * channels)
        padding = (kernel[0] // 2, kernel[1] // 2)
        self.layers = nn.ModuleList(
            nn.Conv2d(before, after, kernel, stride, padding) for before, after in pairwise(widths)
        )
        self.last = nn.Conv2d(widths[-1], 1, kernel, padding=padding)

    def forward(self, x: Tensor) -> Scores:
        """Scores [batch, ...], and the activations of every layer."""
        features = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), SLOPE)
            features.append(x)
        return self.last(x), features


class Discriminators(nn.Module):
    """Waves [batch, samples] to scores and features for every period and window."""

    def __init__(self, channels: int = 8):
        super().__init__()
        self.periods = nn.ModuleList(Discriminator((5, 1), (3, 1), channels) for _ in PERIODS)
        self.spectra = nn.ModuleList(Discriminator((3, 3), (2, 2), channels) for _ in SPECTRA)

    def forward(self, waves: Tensor) -> list[Scores]:
        found = []
        for period, discriminator in zip(PERIODS, self.periods, strict=True):
            padded = F.pad(waves, (0, -waves.shape[1] % period))
            found.append(discriminator(padded.unflatten(1, (-1, period))[:, None]))
        for n_fft, discriminator in zip(SPECTRA, self.spectra, strict=True):
            found.append(discriminator(magnitudes(waves, n_fft, n_fft // 4, n_fft).log()[:, None]))
        return found


def generator_losses(
    discriminators: Discriminators, fake: Tensor, real: Tensor
) -> tuple[Tensor, Tensor]:
    """How well ``fake`` is recognized and how far its features are off, float32 [batch] each.

    Least squares, as in HiFi-GAN. Gradients reach the waves but not the discriminators.
    """
    frozen = {name: p.detach() for name, p in discriminators.named_parameters()}
    found_fake = functional_call(discriminators, frozen, (fake,))
    with torch.no_grad():
        wanted = discriminators(real)
    recognized: Any = sum(_mean((1 - scores).square()) for scores, _ in found_fake)
    distance: Any = sum(
        _mean((found - truth).abs())
        for (_, features), (_, truths) in zip(found_fake, wanted, strict=True)
        for found, truth in zip(features, truths, strict=True)
    )
    return recognized / len(found_fake), distance / len(found_fake)


def discriminator_loss(discriminators: Discriminators, fake: Tensor, real: Tensor) -> Tensor:
    """How badly both are told apart, float32 [batch]; gradients do not reach the waves."""
    pairs = zip(discriminators(fake.detach()), discriminators(real), strict=True)
    losses = [_mean(f.square()) + _mean((1 - r).square()) for (f, _), (r, _) in pairs]
    badness: Any = sum(losses)
    return badness / len(losses)


def _mean(x: Tensor) -> Tensor:
    return x.float().flatten(1).mean(1)
