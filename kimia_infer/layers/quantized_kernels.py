"""Triton kernels of one token through a quantized matrix: every weight is read once, as stored.

PyTorch would write the whole matrix in the working dtype and read it again for each token.
Called through the operator of ``quantization``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows of a program, and bytes of each that it reads together.
BLOCK_ROWS, BLOCK = 4, 1024


def matrix_vector(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """W x + bias [..., rows], accumulated in fp32 and rounded once, of one vector x [..., columns].

    weight is int8 or e4m3 [rows, columns] with scale [rows, 1], or uint8 [rows, columns / 2], two
    values a byte, with scale [rows, columns / group]; see ``quantization``.
    """
    x = x.contiguous()
    rows, columns = weight.shape[0], x.shape[-1]
    out = x.new_empty(*x.shape[:-1], rows)
    grid = (triton.cdiv(rows, BLOCK_ROWS),)
    sizes = {"ROWS": rows, "COLUMNS": columns, "BLOCK_ROWS": BLOCK_ROWS, "BLOCK": BLOCK}
    given = (x, weight, scale, x if bias is None else bias, out)
    has_bias = bias is not None
    with torch.accelerator.device_index(x.device.index):
        if weight.dtype is torch.uint8:
            group = columns // scale.shape[1]
            _by_groups[grid](*given, GROUP=group, HAS_BIAS=has_bias, num_warps=4, **sizes)
        else:
            _by_rows[grid](*given, HAS_BIAS=has_bias, num_warps=4, **sizes)
    return out


@triton.jit
def _finish(total, row, bias, out, ROWS: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Add the bias to the sums of some rows and store them."""
    inside = row < ROWS
    if HAS_BIAS:
        total += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _by_rows(
    x,
    weight,
    scale,
    bias,
    out,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < ROWS
    weight += row.to(tl.int64)[:, None] * COLUMNS
    sums = tl.zeros([BLOCK_ROWS, BLOCK], tl.float32)
    for start in range(0, COLUMNS, BLOCK):
        column = start + tl.arange(0, BLOCK)
        seen = column < COLUMNS
        both = inside[:, None] & seen[None, :]
        values = tl.load(weight + column[None, :], mask=both).to(tl.float32)
        value = tl.load(x + column, mask=seen, other=0.0).to(tl.float32)
        sums += tl.where(both, values, 0.0) * value[None, :]
    total = tl.sum(sums, axis=1) * tl.load(scale + row, mask=inside, other=0.0).to(tl.float32)
    _finish(total, row, bias, out, ROWS, HAS_BIAS)


@triton.jit
def _by_groups(
    x,
    weight,
    scale,
    bias,
    out,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < ROWS
    HALF: tl.constexpr = GROUP // 2
    weight += row.to(tl.int64)[:, None] * (COLUMNS // 2)
    scale += row.to(tl.int64)[:, None] * (COLUMNS // GROUP)
    sums = tl.zeros([BLOCK_ROWS, BLOCK // HALF], tl.float32)
    for start in range(0, COLUMNS // 2, BLOCK):
        byte = start + tl.arange(0, BLOCK)
        seen = byte < COLUMNS // 2
        column = byte // HALF * GROUP + byte % HALF
        packed = tl.load(weight + byte[None, :], mask=inside[:, None] & seen[None, :], other=0)
        first = tl.load(x + column, mask=seen, other=0.0).to(tl.float32)
        second = tl.load(x + column + HALF, mask=seen, other=0.0).to(tl.float32)
        low = ((packed & 15).to(tl.float32) - 8.0) * first[None, :]
        high = ((packed >> 4).to(tl.float32) - 8.0) * second[None, :]
        products = tl.reshape(low + high, [BLOCK_ROWS, BLOCK // HALF, HALF])
        group = start // HALF + tl.arange(0, BLOCK // HALF)
        known = inside[:, None] & (group < COLUMNS // GROUP)[None, :]
        size = tl.load(scale + group[None, :], mask=known, other=0.0).to(tl.float32)
        sums += tl.sum(products, axis=2) * size
    _finish(tl.sum(sums, axis=1), row, bias, out, ROWS, HAS_BIAS)
