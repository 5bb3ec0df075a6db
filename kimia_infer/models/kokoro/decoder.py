"""Pronunciation, pitch and energy of every frame to features, and those to the wave."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kimia_infer.models.kokoro.config import KokoroConfig
from kimia_infer.models.kokoro.generator import Generator
from kimia_infer.models.kokoro.layers import Conv, Rows, StyledBlock

WIDTH, RESIDUAL = 1024, 64
BLOCKS = 4
"""Fixed in the published implementation."""


class Decoder(nn.Module):
    """Parameters are named as in the published checkpoint."""

    def __init__(self, config: KokoroConfig):
        super().__init__()
        style, channels = config.style_dim, config.hidden_dim
        joined = WIDTH + RESIDUAL + 2
        features = config.istftnet.upsample_initial_channel
        self.encode = StyledBlock(style, channels + 2, WIDTH)
        self.decode = nn.ModuleList(
            StyledBlock(style, joined, WIDTH) for _ in range(BLOCKS - 1)
        ).append(StyledBlock(style, joined, features, upsample=True))
        self.F0_conv = Conv(1, 1, 3, stride=2, padding=1)
        self.N_conv = Conv(1, 1, 3, stride=2, padding=1)
        self.asr_res = nn.ModuleList([Conv(channels, RESIDUAL, 1)])
        self.generator = Generator(config.istftnet, style)

    @property
    def dtype(self) -> torch.dtype:
        return self.F0_conv.weight.dtype

    def forward(
        self,
        text: Tensor,
        pitch: Tensor,
        energy: Tensor,
        style: Tensor,
        rows: Rows,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Wave float32 [batch, samples]; behind the end of a row anything.

        Args:
            text: encoded phonemes of each frame, [batch, frames, channels].
            pitch: in Hz, and ``energy``: [batch, 2 * frames].
            style: [batch, style].
            rows: lengths in frames; behind them text, pitch and energy are zero.
            noise: standard normal [batch, samples, HARMONICS]; None leaves it out.
        """
        text, style = text.to(self.dtype), style.to(self.dtype)
        curves = [
            conv(curve.to(self.dtype)[..., None])
            for conv, curve in ((self.F0_conv, pitch), (self.N_conv, energy))
        ]
        x = self.encode(torch.cat([text, *curves], dim=-1), style, rows)
        beside = torch.cat([self.asr_res[0](text), *curves], dim=-1)
        for block in self.decode:
            x = block(torch.cat([x, beside], dim=-1), style, rows)
        return self.generator(x, style, pitch, rows.times(2), noise)
