"""Triton kernels of a token, or a few, through a quantized matrix: each weight is read once.

It is read as stored; PyTorch would write the whole matrix in the working dtype and read it again
for each step. Called through the operator of ``quantization``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows of a program for one vector, and bytes of each that it reads together.
BLOCK_ROWS, BLOCK = 4, 1024
# The smallest side of a product that tensor cores compute; fewer vectors are padded to it.
MIN_TILE = 16
# Rows of a program for several vectors. Each program reads all vectors, so there are twice as many
# where that leaves enough programs for every multiprocessor of a large GPU.
TILE_ROWS, MANY_ROWS = 32, 16384
TILE_BYTES = 256  # of each vector that a program reads together


def matrix_vector(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """W x + bias [..., rows] of vectors x [..., columns], accumulated in fp32 and rounded once.

    weight is int8 or e4m3 [rows, columns] with scale [rows, 1], or uint8 [rows, columns / 2], two
    values a byte, with scale [rows, columns / group]; see ``quantization``. Tensor cores multiply
    several vectors; the two values of a byte are then rounded to the dtype of x after they are
    scaled, as they are where a matrix is dequantized.
    """
    x = x.contiguous()
    rows, columns = weight.shape[0], x.shape[-1]
    count = x.numel() // columns
    out = x.new_empty(*x.shape[:-1], rows)
    given = (x, weight, scale, x if bias is None else bias, out)
    sizes = {"ROWS": rows, "COLUMNS": columns, "HAS_BIAS": bias is not None}
    groups = weight.dtype is torch.uint8
    if groups:
        sizes["GROUP"] = columns // scale.shape[1]
    if count == 1:
        kernel = _by_groups if groups else _by_rows
        sizes |= {"BLOCK_ROWS": BLOCK_ROWS, "BLOCK": BLOCK}
    else:
        kernel = _vectors_by_groups if groups else _vectors_by_rows
        given += (count,)
        sizes |= {
            "VECTORS": max(MIN_TILE, triton.next_power_of_2(count)),
            "BLOCK_ROWS": TILE_ROWS if rows < MANY_ROWS else 2 * TILE_ROWS,
            "BLOCK": TILE_BYTES // x.element_size(),
            "num_stages": 4,
        }
    with torch.accelerator.device_index(x.device.index):
        kernel[(triton.cdiv(rows, sizes["BLOCK_ROWS"]),)](*given, **sizes, num_warps=4)
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


@triton.jit
def _finish_vectors(
    total, row, bias, out, count, VECTORS: tl.constexpr, ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """As :func:`_finish`, of sums [VECTORS, rows]."""
    vector, inside = tl.arange(0, VECTORS), row < ROWS
    if HAS_BIAS:
        total += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)[None, :]
    place = vector[:, None] * ROWS + row[None, :]
    stored = (vector < count)[:, None] & inside[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["count"])
def _vectors_by_rows(
    x,
    weight,
    scale,
    bias,
    out,
    count,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTORS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    vector = tl.arange(0, VECTORS)
    inside, given = row < ROWS, vector < count
    weight += row.to(tl.int64)[:, None] * COLUMNS
    x += vector[:, None] * COLUMNS
    sums = tl.zeros([VECTORS, BLOCK_ROWS], tl.float32)
    for start in range(0, COLUMNS, BLOCK):
        column = start + tl.arange(0, BLOCK)
        seen = column < COLUMNS
        both = inside[:, None] & seen[None, :]
        # int8 and e4m3 have few enough bits to be exact in every dtype of x.
        values = tl.load(weight + column[None, :], mask=both, other=0.0).to(tl.float32)
        value = tl.load(x + column[None, :], mask=given[:, None] & seen[None, :], other=0.0)
        sums = tl.dot(value, tl.trans(values.to(value.dtype)), sums, input_precision="ieee")
    sums *= tl.load(scale + row, mask=inside, other=0.0).to(tl.float32)[None, :]
    _finish_vectors(sums, row, bias, out, count, VECTORS, ROWS, HAS_BIAS)


@triton.jit(do_not_specialize=["count"])
def _vectors_by_groups(
    x,
    weight,
    scale,
    bias,
    out,
    count,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    VECTORS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    vector = tl.arange(0, VECTORS)
    inside, given = row < ROWS, vector < count
    HALF: tl.constexpr = GROUP // 2
    GROUPS: tl.constexpr = BLOCK // HALF
    weight += row.to(tl.int64)[:, None] * (COLUMNS // 2)
    scale += row.to(tl.int64)[:, None] * (COLUMNS // GROUP)
    x += vector[:, None] * COLUMNS
    sums = tl.zeros([VECTORS, BLOCK_ROWS], tl.float32)
    for start in range(0, COLUMNS // 2, BLOCK):
        byte = start + tl.arange(0, BLOCK)
        seen = byte < COLUMNS // 2
        column = byte // HALF * GROUP + byte % HALF
        packed = tl.load(weight + byte[None, :], mask=inside[:, None] & seen[None, :], other=0)
        group = start // HALF + tl.arange(0, GROUPS)
        known = inside[:, None] & (group < COLUMNS // GROUP)[None, :]
        size = tl.load(scale + group[None, :], mask=known, other=0.0).to(tl.float32)
        size = tl.broadcast_to(size[:, :, None], [BLOCK_ROWS, GROUPS, HALF])
        size = tl.reshape(size, [BLOCK_ROWS, BLOCK])
        both = given[:, None] & seen[None, :]
        first = tl.load(x + column[None, :], mask=both, other=0.0)
        second = tl.load(x + column[None, :] + HALF, mask=both, other=0.0)
        low = (((packed & 15).to(tl.float32) - 8.0) * size).to(first.dtype)
        high = (((packed >> 4).to(tl.float32) - 8.0) * size).to(first.dtype)
        sums = tl.dot(first, tl.trans(low), sums, input_precision="ieee")
        sums = tl.dot(second, tl.trans(high), sums, input_precision="ieee")
    _finish_vectors(sums, row, bias, out, count, VECTORS, ROWS, HAS_BIAS)
