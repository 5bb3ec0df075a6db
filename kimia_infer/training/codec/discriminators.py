"""Small discriminators of waves: several periods and several spectral resolutions."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from kimia_infer.training.codec.spectral_loss import magnitudes

PERIODS = (2, 3, 5, 7, 11)
RESOLUTIONS = (512, 1024)
SLOPE = 0.1  # of the leaky rectifiers

Judgement = tuple[Tensor, list[Tensor]]


class Judge(nn.Module):
    """Strided convolutions over an image [batch, 1, height, width], and what they find."""

    def __init__(self, kernel: tuple[int, int], stride: tuple[int, int], channels: int):
        super().__init__()
        widths = (1, channels, 2 * channels, 4 * channels)
        padding = (kernel[0] // 2, kernel[1] // 2)
        self.layers = nn.ModuleList(
            nn.Conv2d(before, after, kernel, stride, padding) for before, after in pairwise(widths)
        )
        self.last = nn.Conv2d(widths[-1], 1, kernel, padding=padding)

    def forward(self, x: Tensor) -> Judgement:
        """Scores [batch, ...], and the activations of every layer."""
        features = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), SLOPE)
            features.append(x)
        return self.last(x), features


class Discriminators(nn.Module):
    """Waves [batch, samples] to one judgement for every period and resolution."""

    def __init__(self, channels: int = 8):
        super().__init__()
        self.periods = nn.ModuleList(Judge((5, 1), (3, 1), channels) for _ in PERIODS)
        self.spectra = nn.ModuleList(Judge((3, 3), (2, 2), channels) for _ in RESOLUTIONS)

    def forward(self, waves: Tensor) -> list[Judgement]:
        found = []
        for period, judge in zip(PERIODS, self.periods, strict=True):
            padded = F.pad(waves, (0, -waves.shape[1] % period))
            found.append(judge(padded.unflatten(1, (-1, period))[:, None]))
        for n_fft, judge in zip(RESOLUTIONS, self.spectra, strict=True):
            found.append(judge(magnitudes(waves, n_fft, n_fft // 4, n_fft).log()[:, None]))
        return found


def generator_losses(judges: Discriminators, fake: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """How well ``fake`` is recognized and how far its features are off, float32 [batch] each.

    Least squares, as in HiFi-GAN. Gradients reach the waves but not the discriminators.
    """
    frozen = {name: p.detach() for name, p in judges.named_parameters()}
    judged = functional_call(judges, frozen, (fake,))
    with torch.no_grad():
        wanted = judges(real)
    recognized = sum(_mean((1 - scores).square()) for scores, _ in judged)
    distance = sum(
        _mean((found - truth).abs())
        for (_, features), (_, truths) in zip(judged, wanted, strict=True)
        for found, truth in zip(features, truths, strict=True)
    )
    return recognized / len(judged), distance / len(judged)


def discriminator_loss(judges: Discriminators, fake: Tensor, real: Tensor) -> Tensor:
    """How badly both are told apart, float32 [batch]; gradients do not reach the waves."""
    pairs = zip(judges(fake.detach()), judges(real), strict=True)
    losses = [_mean(f.square()) + _mean((1 - r).square()) for (f, _), (r, _) in pairs]
    return sum(losses) / len(losses)


def _mean(x: Tensor) -> Tensor:
    return x.float().flatten(1).mean(1)
