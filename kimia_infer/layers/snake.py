"""The vocoder's nonlinearity: SnakeBeta at twice the rate, between two low-pass filters.

Doubling the rate before the nonlinearity and halving it afterwards keeps the harmonics that
it creates from folding back (BigVGAN's anti-aliased activation).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimia_infer.layers.triton_support import fused

# Low-pass filter at a quarter of the doubled rate; published configuration.
TAPS = 12
CUTOFF = 0.25
HALF_WIDTH = 0.3


@functools.cache
def low_pass_filter() -> tuple[float, ...]:
    """The windowed sinc (Kaiser window) of both rate changes, with sum 1."""
    half = TAPS // 2
    attenuation = 2.285 * (half - 1) * math.pi * 4 * HALF_WIDTH + 7.95
    beta = 0.1102 * (attenuation - 8.7)  # Kaiser's formula above 50 dB, where this filter is
    window = torch.kaiser_window(TAPS, periodic=False, beta=beta, dtype=torch.float64)
    times = torch.arange(-half, half, dtype=torch.float64) + 0.5
    taps = window * torch.sinc(2 * CUTOFF * times)
    return tuple((taps / taps.sum()).tolist())


def _correlate(x: Tensor, taps: Sequence[float], total: Tensor | None = None) -> Tensor:
    """Sum of ``taps[k] * x[..., n + k]``, shorter than x by ``len(taps) - 1``; onto ``total``.

    Shifted sums are several times faster than a per-channel convolution on a CPU.
    """
    length = x.shape[-1] - len(taps) + 1
    terms = [(x[..., shift : shift + length], tap) for shift, tap in enumerate(taps)]
    if total is None:
        first, tap = terms.pop(0)
        total = first * tap
    for shifted, tap in terms:
        total.add_(shifted, alpha=tap)
    return total


def upsample(x: Tensor) -> tuple[Tensor, Tensor]:
    """The even and the odd samples of x [..., time] at twice the rate, each [..., time]."""
    taps = [2 * tap for tap in reversed(low_pass_filter())]
    padded = F.pad(x, (3, 3), mode="replicate")
    return _correlate(padded[..., :-1], taps[0::2]), _correlate(padded[..., 1:], taps[1::2])


def downsample(even: Tensor, odd: Tensor) -> Tensor:
    """Back to half the rate, from the even and the odd samples, each [..., time]."""
    taps = low_pass_filter()
    first, last = even[..., :1], odd[..., -1:]
    even = torch.cat([first, first, even, last, last, last], dim=-1)
    odd = torch.cat([first, first, first, odd, last, last], dim=-1)
    return _correlate(odd, taps[0::2], total=_correlate(even, taps[1::2]))


class SnakeBeta(nn.Module):
    """x + sin(x * e^alpha)^2 / e^beta per channel, parameters stored as logarithms."""

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(channels))
        self.beta = nn.Parameter(torch.empty(channels))

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """Frequency and amplitude, fp32 [channels, 1]."""
        frequency, width = self.alpha.float().exp(), self.beta.float().exp()
        return frequency[:, None], 1 / (width[:, None] + 1e-9)


class AntiAliasedSnake(nn.Module):
    """SnakeBeta of x [..., channels, time], in fp32 whatever the dtype of x.

    Summing twelve taps in bf16 would round twelve times; the filters of other implementations
    also accumulate in fp32.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.act = SnakeBeta(channels)

    def forward(self, x: Tensor) -> Tensor:
        if fused(x):
            from kimia_infer.layers.snake_kernels import anti_aliased_snake

            return anti_aliased_snake(x, self.act.alpha, self.act.beta, low_pass_filter())
        frequency, amplitude = self.act.coefficients()
        even, odd = (
            torch.addcmul(y, amplitude, (y * frequency).sin_().square_())
            for y in upsample(x.float())
        )
        return downsample(even, odd).to(x.dtype)
