"""The source of the voice, sines of the pitch and noise, and spectra of waves.

Sums and products are in the order of the published implementation: the phase of a long sentence
is a large float32 number, and another order changes its last bits, which are audible as phase.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimia_infer.models.kokoro.config import HARMONICS, SAMPLE_RATE
from kimia_infer.models.kokoro.layers import Rows

AMPLITUDE = 0.1
VOICED_HZ = 10.0
VOICED_NOISE, UNVOICED_NOISE = 0.003, AMPLITUDE / 3


class Source(nn.Module):
    """A wave with the harmonics of a pitch curve; ``l_linear`` mixes them."""

    def __init__(self, samples: int):
        """``samples``: of the wave, for each value of the curve."""
        super().__init__()
        self.samples = samples
        self.l_linear = nn.Linear(HARMONICS, 1)

    def forward(self, pitch: Tensor, noise: Tensor | None) -> Tensor:
        """The wave float32 [batch, samples * time] of pitch [batch, time] in Hz.

        ``noise`` is standard normal, [batch, samples * time, HARMONICS]; None leaves it out.
        """
        sines = self.sines(pitch)
        if noise is not None:
            voiced = self._upsampled(pitch > VOICED_HZ)
            sines = sines + noise * torch.where(voiced, VOICED_NOISE, UNVOICED_NOISE)
        mixed = F.linear(sines, self.l_linear.weight.float(), self.l_linear.bias.float())
        return torch.tanh(mixed)[..., 0]

    def sines(self, pitch: Tensor) -> Tensor:
        """[batch, samples * time, HARMONICS], zero where the pitch is that of no voice.

        The pitch is constant over ``samples``, so that the published phase at the high rate,
        reduced, summed and interpolated, is one of the rate of the pitch, interpolated.
        """
        order = torch.arange(1, HARMONICS + 1, device=pitch.device, dtype=torch.float32)
        turns = (pitch.float()[..., None] * order / SAMPLE_RATE) % 1
        phase = torch.cumsum(turns, dim=1) * 2 * math.pi
        phase = F.interpolate(
            phase.mT * self.samples, scale_factor=float(self.samples), mode="linear"
        )
        return (torch.sin(phase) * AMPLITUDE).mT * self._upsampled(pitch > VOICED_HZ)

    def _upsampled(self, values: Tensor) -> Tensor:
        return values.repeat_interleave(self.samples, dim=1)[..., None]


class Spectrum(nn.Module):
    """Short spectra of waves and back, with windows of four hops and reflected ends."""

    def __init__(self, hop: int):
        super().__init__()
        self.hop, self.size = hop, 4 * hop

    def _window(self, device: torch.device) -> Tensor:
        return torch.hann_window(self.size, device=device)

    def forward(self, wave: Tensor, rows: Rows) -> Tensor:
        """Magnitudes, then angles, [batch, frames, 2 * bins] of wave [batch, samples].

        A row of n samples has n / hop + 1 frames. Behind them are zeros.
        """
        half = self.size // 2
        last = wave.shape[1] - 1 if rows.lengths is None else rows.lengths[:, None] - 1
        places = torch.arange(-half, wave.shape[1] + half, device=wave.device)[None].abs()
        places = (last - (last - places).abs()).clamp(min=0).expand(len(wave), -1)
        found = torch.stft(
            wave.gather(1, places),
            self.size,
            self.hop,
            window=self._window(wave.device),
            center=False,
            return_complex=True,
        ).mT
        frames = Rows(None if rows.lengths is None else rows.lengths // self.hop + 1)
        return frames.clear(torch.cat([found.abs(), found.angle()], dim=-1))

    def inverse(self, magnitude: Tensor, angle: Tensor, rows: Rows) -> Tensor:
        """Wave [batch, hop * (frames - 1)] of magnitude and angle [batch, frames, bins] each.

        ``rows`` are lengths in frames. Overlapping windows are divided by the sum of their
        squares, which is smaller at both ends of a row.
        """
        window = self._window(magnitude.device)
        pieces = torch.fft.irfft(torch.polar(magnitude, angle), n=self.size, dim=-1) * window
        weights = window.square().expand(len(pieces), pieces.shape[1], -1)
        total = self._overlapped(rows.clear(pieces))
        return total / self._overlapped(rows.clear(weights)).clamp(min=1e-11)

    def _overlapped(self, pieces: Tensor) -> Tensor:
        """The sum of pieces [batch, frames, 4 * hop], each a hop later, without the padding."""
        batch, frames, _ = pieces.shape
        blocks = pieces.view(batch, frames, 4, self.hop)
        total = pieces.new_zeros(batch, frames + 3, self.hop)
        for place in range(4):
            total[:, place : place + frames] += blocks[:, :, place]
        return total[:, 2 : frames + 1].reshape(batch, -1)
