"""The vocoder's nonlinearity as one Triton kernel: its signal is read once and written once.

Called through the operator of ``snake``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

LANES = 64  # each computes four neighboring outputs, which share most of their samples


def anti_aliased_snake(
    x: Tensor, log_alpha: Tensor, log_beta: Tensor, taps: Sequence[float]
) -> Tensor:
    """``AntiAliasedSnake`` of x [..., channels, time], computed in fp32 and rounded once.

    log_alpha and log_beta [channels] are the parameters of its SnakeBeta, ``taps`` its filter.
    """
    x = x.contiguous()
    channels, time = x.shape[-2:]
    y = torch.empty_like(x)
    grid = (triton.cdiv(time, 4 * LANES), x.numel() // time)
    with torch.accelerator.device_index(x.device.index):
        _anti_aliased_snake[grid](
            x,
            y,
            log_alpha,
            log_beta,
            channels,
            time,
            FILTER=tuple(taps),
            TAPS=len(taps),
            LANES=LANES,
            num_warps=2,
        )
    return y


@triton.jit
def _activated(
    x,
    base,
    OFFSET: tl.constexpr,
    IS_EVEN: tl.constexpr,
    time,
    frequency,
    amplitude,
    FILTER: tl.constexpr,
):
    """Samples of the doubled rate after SnakeBeta, from six of x from base + OFFSET on.

    An even sample 2n needs those from n - 3 on, an odd one, 2n + 1, those from n - 2 on.
    """
    value = 0.0
    for index in tl.static_range(6):
        # One constant, so that loads of different samples are recognized as the same.
        place = tl.minimum(tl.maximum(base + (OFFSET + index), 0), time - 1)
        value += 2.0 * FILTER[10 + IS_EVEN - 2 * index] * tl.load(x + place).to(tl.float32)
    sine = tl.sin(value * frequency)
    return value + amplitude * (sine * sine)


@triton.jit
def _anti_aliased_snake(
    x,
    y,
    log_alpha,
    log_beta,
    channels,
    time,
    FILTER: tl.constexpr,
    TAPS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Output n is the sum of FILTER[k] times sample 2n + k - 5 of the doubled rate."""
    row = tl.program_id(1).to(tl.int64)
    x += row * time
    y += row * time
    channel = tl.program_id(1) % channels
    frequency = tl.exp(tl.load(log_alpha + channel).to(tl.float32))
    amplitude = 1.0 / (tl.exp(tl.load(log_beta + channel).to(tl.float32)) + 1e-9)
    # The activated signal, not x, is continued by its first and last sample.
    start = tl.full((), 0, tl.int32)
    first = _activated(x, start, -3, 1, time, frequency, amplitude, FILTER)
    last = _activated(x, start + time, -3, 0, time, frequency, amplitude, FILTER)

    output = (tl.program_id(0) * LANES + tl.arange(0, LANES)) * 4
    sum0 = tl.zeros([LANES], tl.float32)
    sum1 = tl.zeros([LANES], tl.float32)
    sum2 = tl.zeros([LANES], tl.float32)
    sum3 = tl.zeros([LANES], tl.float32)
    for index in tl.static_range(TAPS + 6):
        value = _activated(x, output, index // 2 - 5, index % 2, time, frequency, amplitude, FILTER)
        place = 2 * output + (index - 5)
        value = tl.where(place < 0, first, tl.where(place < 2 * time, value, last))
        if index < TAPS:
            sum0 += FILTER[index] * value
        if index >= 2 and index < TAPS + 2:
            sum1 += FILTER[index - 2] * value
        if index >= 4 and index < TAPS + 4:
            sum2 += FILTER[index - 4] * value
        if index >= 6:
            sum3 += FILTER[index - 6] * value
    # Neighbors are interleaved so that each lane writes its four at once.
    total = tl.interleave(tl.interleave(sum0, sum2), tl.interleave(sum1, sum3))
    output = tl.program_id(0) * LANES * 4 + tl.arange(0, LANES * 4)
    tl.store(y + output, total.to(y.dtype.element_ty), mask=output < time)
