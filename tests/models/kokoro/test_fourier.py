"""Convolutions by Fourier transforms against those of PyTorch, computed in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kimia_infer.models.kokoro import fourier
from kimia_infer.models.kokoro.fourier import FourierConv, use_fourier
from kimia_infer.models.kokoro.layers import Conv


def conv(kernel: int, dilation: int = 1, channels: int = 64, stride: int = 1) -> Conv:
    torch.manual_seed(kernel)
    padding = (kernel - 1) * dilation // 2
    return Conv(channels, channels, kernel, stride, padding=padding, dilation=dilation)


@pytest.mark.parametrize(
    ("batch", "time", "kernel", "dilation"),
    [(1, 100, 7, 1), (2, 101, 11, 3), (3, 5, 7, 5), (1, 1, 11, 5), (1, 14, 11, 1)],
)
def test_equals_a_convolution(batch: int, time: int, kernel: int, dilation: int) -> None:
    plain = conv(kernel, dilation)
    x = torch.randn(batch, time, 64, generator=torch.Generator().manual_seed(0))
    weight, bias = plain.weight.double(), plain.bias.double()  # type: ignore[union-attr]
    padding = int(plain.padding[0])
    expected = F.conv1d(x.mT.double(), weight, bias, padding=padding, dilation=dilation).mT
    found = FourierConv(plain)(x)
    torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=0)


def test_pieces_are_computed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, x = conv(11, 3), torch.randn(2, 200, 64)
    monkeypatch.setattr(fourier, "BLOCK_VALUES", 3 * 24 * 2 * 3 * 64)
    torch.testing.assert_close(FourierConv(plain)(x), plain(x), atol=2e-6, rtol=0)


def test_other_dtypes_are_computed_as_before() -> None:
    plain = conv(7)
    x = torch.randn(1, 30, 64).bfloat16()
    assert torch.equal(FourierConv(plain).bfloat16()(x), plain.bfloat16()(x))


def test_which_layers_are_replaced() -> None:
    layers = nn.ModuleList([conv(7), conv(11, 3), conv(3), conv(7, channels=16), conv(7, stride=2)])
    use_fourier(layers)
    assert [type(layer) is FourierConv for layer in layers] == [True, True, False, False, False]
    half = nn.ModuleList([conv(7).bfloat16()])
    use_fourier(half)
    assert type(half[0]) is Conv
