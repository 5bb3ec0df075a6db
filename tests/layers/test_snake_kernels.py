"""The vocoder's fused nonlinearity: interpreted, against PyTorch; and compiled for GPUs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kimia_infer.models.kimi_audio.vocoder import AntiAliasedSnake, low_pass_filter
from tests.interpreted import compiled, interpreted, needs_triton, recorded_launches

pytestmark = needs_triton

DTYPES = [torch.float32, torch.bfloat16]


def check(shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> None:
    from kimia_infer.layers.snake_kernels import anti_aliased_snake

    generator = torch.Generator().manual_seed(shape[-1])
    module = AntiAliasedSnake(shape[-2]).to(dtype).requires_grad_(False)
    for parameter in module.parameters():
        parameter.normal_(generator=generator)
    x = (scale * torch.randn(shape, generator=generator)).to(dtype)
    actual = anti_aliased_snake(x, module.act.alpha, module.act.beta, low_pass_filter())
    expected = module(x)
    assert actual.dtype is dtype
    # The sine of a large argument is as inexact as that argument in fp32; in bf16 the one
    # rounding may fall to the other of two neighbors.
    rounding = 0 if dtype is torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(actual, expected, atol=1e-5 * scale, rtol=1e-6 + rounding)


LENGTHS = [1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 250, 251, 255, 256, 257, 261, 262, 600]


@pytest.mark.parametrize(
    ("time", "dtype"),
    [*((n, torch.float32) for n in LENGTHS), *((n, torch.bfloat16) for n in (1, 12, 257, 600))],
)
def test_lengths(time: int, dtype: torch.dtype) -> None:
    """Programs of 256 outputs, filters of twelve taps, edges continued on both sides."""
    interpreted(check, (2, time), dtype)


@pytest.mark.parametrize("shape", [(1, 1), (5, 40), (2, 3, 40)])
def test_every_channel_has_its_own_parameters(shape: tuple[int, ...]) -> None:
    interpreted(check, shape, torch.float32)


@settings(max_examples=settings.default.max_examples // 5)
@given(
    channels=st.integers(1, 3),
    time=st.integers(1, 700),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([0.01, 1.0, 10.0]),
)
def test_any_input(channels: int, time: int, dtype: torch.dtype, scale: float) -> None:
    interpreted(check, (channels, time), dtype, scale)


# Lengths divisible by 16, others, and 1, are compiled apart.
@pytest.mark.parametrize(
    ("time", "dtype", "capability"),
    [
        (4800, torch.bfloat16, 80),
        (4801, torch.bfloat16, 90),
        (4800, torch.float32, 90),
        (4801, torch.float32, 80),
        (1, torch.bfloat16, 90),
    ],
)
def test_compiled(
    monkeypatch: pytest.MonkeyPatch, time: int, dtype: torch.dtype, capability: int
) -> None:
    from kimia_infer.layers.snake_kernels import anti_aliased_snake

    x = torch.empty(min(time, 16), time, dtype=dtype)
    parameter = torch.empty(len(x), dtype=dtype)
    work = lambda: anti_aliased_snake(x, parameter, parameter, low_pass_filter())  # noqa: E731
    [launch] = recorded_launches(monkeypatch, work)
    assert compiled(launch, capability).metadata.num_warps == 2
