"""Convolutions with long kernels by short Fourier transforms, for float32 on CPUs.

A piece of the signal of a few kernels' length is transformed, its frequencies are multiplied by
those of the kernel, and the result is transformed back. A complex product takes three real ones
of sums of its parts, and the sums are part of the transforms. So all that is left is three matrix
products: into ``points``, across channels at each point, and back. That is a third of the
multiplications of a kernel of 11, with the accuracy of float32.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimia_infer.models.kokoro.layers import Conv

SHORTEST_KERNEL = 7
FEWEST_CHANNELS = 64
"""With fewer, or a shorter kernel, the transforms take longer than what they save."""

BLOCK_VALUES = 2**20
"""Values of all points that are computed at a time, so that they stay in the caches."""


def transform_size(kernel: int) -> int:
    """Samples that are transformed at a time; longer ones gain little and need more memory."""
    return 16 if kernel <= 8 else 24


@cache
def transforms(size: int, kernel: int) -> tuple[Tensor, Tensor]:
    """From a piece to points [points, size], and from their products to new samples.

    The second is [samples, points], where ``samples = size - kernel + 1`` are those of a piece
    that no sample beyond it belongs to.
    """
    places = torch.arange(size, dtype=torch.float64)
    alternating = torch.cos(math.pi * places)
    into, back = [torch.ones_like(places), alternating], [torch.ones_like(places), alternating]
    for frequency in range(1, size // 2):
        cosine = torch.cos(2 * math.pi * frequency * places / size)
        sine = torch.sin(2 * math.pi * frequency * places / size)
        into += [cosine - sine, cosine, -sine]
        back += [2 * (cosine - sine), -2 * sine, -2 * cosine]
    new = size - kernel + 1
    return torch.stack(into).float(), (torch.stack(back, 1)[:new] / size).float().contiguous()


def kernel_points(weight: Tensor, size: int) -> Tensor:
    """The points [points, in, out] of a kernel, weight [out, in, kernel]."""
    outputs, inputs, kernel = weight.shape
    taps = torch.arange(kernel, dtype=torch.float64)
    rows = [torch.ones_like(taps), torch.cos(math.pi * taps)]
    for frequency in range(1, size // 2):
        cosine = torch.cos(2 * math.pi * frequency * taps / size)
        sine = torch.sin(2 * math.pi * frequency * taps / size)
        rows += [cosine, sine - cosine, cosine + sine]
    table = torch.stack(rows).float()
    return (table @ weight.permute(2, 1, 0).reshape(kernel, -1)).view(-1, inputs, outputs)


class FourierConv(Conv):
    """A :class:`Conv` with the same number of frames in and out, faster on a CPU.

    Anything but float32 on the CPU is computed as ``Conv`` does.
    """

    points: Tensor

    def __init__(self, conv: Conv):
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size[0],
            padding=int(conv.padding[0]),
            dilation=conv.dilation[0],
            device="meta",
        )
        self.weight, self.bias = conv.weight, conv.bias
        self.size = transform_size(conv.kernel_size[0])
        points = kernel_points(conv.weight.detach(), self.size)
        self.register_buffer("points", points, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """input [batch, time, in] -> [batch, time, out]."""
        if not input.is_cpu or input.dtype is not torch.float32 or self.bias is None:
            return super().forward(input)
        batch, time, channels = input.shape
        into, back = transforms(self.size, self.kernel_size[0])
        step, new = self.dilation[0], len(back)
        pieces = -(-time // (new * step))
        length = (pieces * new + self.size - new) * step
        before = int(self.padding[0])
        padded = F.pad(input, (0, 0, before, length - time - before))
        # Samples of a piece are ``step`` apart; the pieces between them follow each other.
        strides = (step * channels, length * channels, new * step * channels, channels, 1)
        shape = (self.size, batch, pieces, step, channels)
        signal = padded.as_strided(shape, strides)
        out = input.new_empty(batch, pieces, new, step, self.out_channels)
        block = max(1, BLOCK_VALUES // (len(into) * batch * step * channels))
        for start in range(0, pieces, block):
            samples = signal[:, :, start : start + block].reshape(self.size, -1)
            products = torch.bmm((into @ samples).view(len(into), -1, channels), self.points)
            found = (back @ products.view(len(into), -1)).view(new, batch, -1, step, out.shape[-1])
            out[:, start : start + block] = found.permute(1, 2, 0, 3, 4)
        out = out.view(batch, -1, self.out_channels)
        return out[:, :time] + self.bias


def use_fourier(module: nn.Module) -> None:
    """Replace the convolutions below ``module`` that are faster this way, if on the CPU."""
    for parent in list(module.modules()):
        for name, layer in parent.named_children():
            if type(layer) is Conv and _gains(layer):
                setattr(parent, name, FourierConv(layer))


def _gains(conv: Conv) -> bool:
    same = 2 * int(conv.padding[0]) == conv.dilation[0] * (conv.kernel_size[0] - 1)
    return (
        conv.kernel_size[0] >= SHORTEST_KERNEL
        and min(conv.weight.shape[:2]) >= FEWEST_CHANNELS
        and same
        and conv.stride == (1,)
        and conv.groups == 1
        and conv.weight.is_cpu
        and conv.weight.dtype is torch.float32
    )
