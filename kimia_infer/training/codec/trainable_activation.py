"""The vocoder's nonlinearity in training: cheap at first, then as served with cheap gradients."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimia_infer.layers.snake import (
    AntiAliasedSnake,
    downsample,
    low_pass_filter,
    upsample,
)


def use_activations(module: nn.Module, anti_aliased: bool) -> None:
    """How the activations of ``module`` are computed: as they are served, or at their own rate.

    Without the change of the rate, a step is several times faster and the wave nearly as good.
    """
    forward = _served if anti_aliased else _plain
    for activation in module.modules():
        if isinstance(activation, AntiAliasedSnake):
            activation.forward = partial(forward, activation)


def _plain(activation: AntiAliasedSnake, x: Tensor) -> Tensor:
    frequency, amplitude = activation.act.coefficients()
    return torch.addcmul(x.float(), amplitude, (x * frequency).sin().square()).to(x.dtype)


def _served(activation: AntiAliasedSnake, x: Tensor) -> Tensor:
    """What :class:`AntiAliasedSnake` computes."""
    frequency, amplitude = activation.act.coefficients()
    even, odd = (
        torch.addcmul(y, amplitude, (y * frequency).sin().square())
        for y in _Upsample.apply(x.float())
    )
    return _Downsample.apply(even, odd).to(x.dtype)


class _Upsample(torch.autograd.Function):
    """:func:`upsample`; its gradient is a filter too, instead of one operation per tap."""

    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[Tensor, Tensor]:
        return upsample(x)

    @staticmethod
    def backward(ctx, even: Tensor, odd: Tensor) -> Tensor:
        taps = [2 * tap for tap in reversed(low_pass_filter())]
        padded = _spread(even, taps[0::2], (0, 1)).add_(_spread(odd, taps[1::2], (1, 0)))
        return _fold(padded, 3, 3)


class _Downsample(torch.autograd.Function):
    """:func:`downsample`, likewise."""

    @staticmethod
    def forward(ctx, even: Tensor, odd: Tensor) -> Tensor:
        return downsample(even, odd)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        taps = low_pass_filter()
        # At both edges downsample repeats the first even and the last odd sample.
        even, odd = _spread(grad, taps[1::2]), _spread(grad, taps[0::2])
        first, last = odd[..., :3].sum(-1), even[..., -3:].sum(-1)
        even, odd = _fold(even[..., :-3], 2, 0), _fold(odd[..., 3:], 0, 2)
        even[..., 0] += first
        odd[..., -1] += last
        return even, odd


def _spread(grad: Tensor, taps: Sequence[float], longer: tuple[int, int] = (0, 0)) -> Tensor:
    """Gradient of x, where ``grad[n]`` is that of the sum of ``taps[k] * x[n + k]``.

    ``longer``: values before and after those, of which there is no gradient.
    """
    reach = len(taps) - 1
    padded = F.pad(grad, (reach + longer[0], reach + longer[1]))
    length = padded.shape[-1] - reach
    total = padded[..., reach:] * taps[0]
    for shift, tap in enumerate(taps[1:], 1):
        total.add_(padded[..., reach - shift : reach - shift + length], alpha=tap)
    return total


def _fold(padded: Tensor, before: int, after: int) -> Tensor:
    """Gradient of x from that of x with its edges repeated ``before`` and ``after`` times."""
    end = padded.shape[-1] - after
    inner = padded[..., before:end].clone()
    if before:
        inner[..., 0] += padded[..., :before].sum(-1)
    if after:
        inner[..., -1] += padded[..., end:].sum(-1)
    return inner
