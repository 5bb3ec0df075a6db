"""The source of a voice: sines of the pitch, and noise.

Sums and products are in the order of the published implementations: the phase of a long sentence
is a large float32 number, and another order changes its last bits, which are audible as phase.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AMPLITUDE = 0.1
VOICED_HZ = 10.0
VOICED_NOISE, UNVOICED_NOISE = 0.003, AMPLITUDE / 3


class Source(nn.Module):
    """A wave with the harmonics of a pitch curve; ``l_linear`` mixes them."""

    def __init__(self, samples: int, harmonics: int, sample_rate: int):
        """``samples``: of the wave, for each value of the curve."""
        super().__init__()
        self.samples, self.sample_rate = samples, sample_rate
        self.l_linear = nn.Linear(harmonics, 1)

    def forward(self, pitch: Tensor, noise: Tensor | None) -> Tensor:
        """The wave float32 [batch, samples * time] of pitch [batch, time] in Hz.

        ``noise`` is standard normal, [batch, samples * time, harmonics]; None leaves it out.
        """
        sines = self.sines(pitch)
        if noise is not None:
            voiced = self._upsampled(pitch > VOICED_HZ)
            sines = sines + noise * torch.where(voiced, VOICED_NOISE, UNVOICED_NOISE)
        mixed = F.linear(sines, self.l_linear.weight.float(), self.l_linear.bias.float())
        return torch.tanh(mixed)[..., 0]

    def sines(self, pitch: Tensor) -> Tensor:
        """[batch, samples * time, harmonics], zero where the pitch is that of no voice.

        The pitch is constant over ``samples``, so that the published phase at the high rate,
        reduced, summed and interpolated, is one of the rate of the pitch, interpolated.
        """
        harmonics = self.l_linear.in_features
        order = torch.arange(1, harmonics + 1, device=pitch.device, dtype=torch.float32)
        turns = (pitch.float()[..., None] * order / self.sample_rate) % 1
        phase = torch.cumsum(turns, dim=1) * 2 * math.pi
        phase = F.interpolate(
            phase.mT * self.samples, scale_factor=float(self.samples), mode="linear"
        )
        return (torch.sin(phase) * AMPLITUDE).mT * self._upsampled(pitch > VOICED_HZ)

    def _upsampled(self, values: Tensor) -> Tensor:
        return values.repeat_interleave(self.samples, dim=1)[..., None]
