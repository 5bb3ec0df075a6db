"""Spectra of waves, and waves of spectra."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kimia_infer.models.kokoro.layers import Rows


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
