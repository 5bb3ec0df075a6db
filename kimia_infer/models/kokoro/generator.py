"""Decoder features and pitch to the wave: iSTFTNet, with styled snake blocks beside a source."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimia_infer.layers.harmonics import Source
from kimia_infer.models.kokoro.config import HARMONICS, SAMPLE_RATE, GeneratorSizes
from kimia_infer.models.kokoro.layers import AdaIN, Conv, Rows, TransposedConv
from kimia_infer.models.kokoro.source import Spectrum

OUTER_KERNEL = 7
NOISE_KERNEL, LAST_NOISE_KERNEL = 7, 11
"""Kernels of the blocks between source and features, published implementation."""


class SnakeBlock(nn.Module):
    """For every dilation: AdaIN, snake, dilated convolution, AdaIN, snake, convolution, sum.

    The published snake x + sin(a x)^2 / a has a frequency a of each channel. Here a is part of
    the AdaIN before it and of the convolution behind it, so that what is left is
    x + sin(x)^2.
    """

    def __init__(self, style: int, channels: int, kernel: int, dilations: list[int]):
        super().__init__()
        self.convs1 = nn.ModuleList(_same(channels, kernel, d) for d in dilations)
        self.convs2 = nn.ModuleList(_same(channels, kernel, 1) for _ in dilations)
        self.adain1 = nn.ModuleList(AdaIN(style, channels) for _ in dilations)
        self.adain2 = nn.ModuleList(AdaIN(style, channels) for _ in dilations)

    def forward(self, x: Tensor, style: Tensor, rows: Rows) -> Tensor:
        """x [batch, time, channels] -> the same shape; behind ends anything."""
        for norm1, conv1, norm2, conv2 in zip(
            self.adain1, self.convs1, self.adain2, self.convs2, strict=True
        ):
            y = conv1(snake(norm1(x, style, rows)))
            x = conv2(snake(norm2(y, style, rows))) + x
        return x


def snake(x: Tensor) -> Tensor:
    """x + sin(x)^2; changes x."""
    sine = torch.sin(x)
    return x.addcmul_(sine, sine)


def _same(channels: int, kernel: int, dilation: int) -> Conv:
    padding = (kernel - 1) * dilation // 2
    return Conv(channels, channels, kernel, padding=padding, dilation=dilation)


class Generator(nn.Module):
    """Parameters are named as in the published checkpoint."""

    def __init__(self, sizes: GeneratorSizes, style: int):
        super().__init__()
        self.sizes = sizes
        self.m_source = Source(sizes.frame_samples, HARMONICS, SAMPLE_RATE)
        self.spectrum = Spectrum(sizes.gen_istft_hop_size)
        self.ups, self.resblocks = nn.ModuleList(), nn.ModuleList()
        self.noise_convs, self.noise_res = nn.ModuleList(), nn.ModuleList()
        channels, last = sizes.upsample_initial_channel, len(sizes.upsample_rates) - 1
        for stage, (rate, kernel) in enumerate(
            zip(sizes.upsample_rates, sizes.upsample_kernel_sizes, strict=True)
        ):
            half = channels // 2
            self.ups.append(
                TransposedConv(channels, half, kernel, rate, padding=(kernel - rate) // 2)
            )
            blocks = zip(sizes.resblock_kernel_sizes, sizes.resblock_dilation_sizes, strict=True)
            self.resblocks.extend(SnakeBlock(style, half, k, d) for k, d in blocks)
            self.noise_convs.append(self._noise_conv(stage, half))
            noise_kernel = LAST_NOISE_KERNEL if stage == last else NOISE_KERNEL
            self.noise_res.append(SnakeBlock(style, half, noise_kernel, [1, 3, 5]))
            channels = half
        self.conv_post = Conv(channels, 2 * sizes.bins, OUTER_KERNEL, padding=OUTER_KERNEL // 2)

    def _noise_conv(self, stage: int, channels: int) -> Conv:
        """From the rate of spectra to that of a stage."""
        step = 1
        for rate in self.sizes.upsample_rates[stage + 1 :]:
            step *= rate
        if step == 1:
            return Conv(2 * self.sizes.bins, channels, 1)
        padding = (step + 1) // 2
        return Conv(2 * self.sizes.bins, channels, 2 * step, stride=step, padding=padding)

    def forward(
        self, x: Tensor, style: Tensor, pitch: Tensor, rows: Rows, noise: Tensor | None
    ) -> Tensor:
        """Wave float32 [batch, samples], not clipped.

        x [batch, time, channels] and pitch [batch, time] in Hz, zero behind the ends that
        ``rows`` gives; noise as :class:`Source` takes it.
        """
        wave = self.m_source(pitch, noise)
        spectrum = self.spectrum(wave, rows.times(self.sizes.frame_samples)).to(x.dtype)
        branches, last = len(self.sizes.resblock_kernel_sizes), len(self.ups) - 1
        for stage, (up, noise_conv, noise_block) in enumerate(
            zip(self.ups, self.noise_convs, self.noise_res, strict=True)
        ):
            more = int(stage == last)  # the frames of spectra are one more
            at_rate = rows.times(self.sizes.upsample_rates[stage], more)
            beside = noise_block(noise_conv(spectrum), style, at_rate)
            x = up(rows.clear(F.leaky_relu(x, 0.1)))
            if more:
                x = torch.cat([x[:, 1:2], x], dim=1)
            x, rows = x + beside, at_rate
            blocks = self.resblocks[stage * branches : (stage + 1) * branches]
            total = blocks[0](x, style, rows)
            for block in blocks[1:]:
                total = total + block(x, style, rows)
            x = total / branches
        out = self.conv_post(rows.clear(F.leaky_relu(x, 0.01))).float()
        magnitude, angle = out.chunk(2, dim=-1)
        return self.spectrum.inverse(torch.exp(magnitude), torch.sin(angle), rows)
