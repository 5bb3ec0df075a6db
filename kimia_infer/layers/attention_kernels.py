"""Triton kernels of decode steps, one token a row.

Shapes are fixed and positions are read on the device, so that a step can be recorded in a
graph. Values are rounded to the tensors' dtype where the equivalent chain of PyTorch operations
rounds. Called through the operators of ``operators`` and ``attention``.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs among which the positions of one key head are divided: with four key heads and one row,
# about one for every multiprocessor of a large GPU. Several rows share as many.
SPLITS = 32
FEWEST_SPLITS = 4
# The smallest matrix product that tensor cores compute, in rows, columns and terms.
MIN_TILE = 16
BLOCK_BYTES = 128  # of one column of the keys read together: 64 positions in bf16, 32 in fp32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x [..., hidden] times weight [hidden], computed in fp32 and rounded once."""
    x = x.contiguous()
    return _launch_norm(x, None, weight, x, eps)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + delta, both [..., hidden], rounded to their dtype, and its :func:`rms_norm`."""
    x, total = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    return total, _launch_norm(x, delta.contiguous(), weight, total, eps)


def _launch_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, total: Tensor, eps: float
) -> Tensor:
    norm = torch.empty_like(x)
    hidden = x.shape[-1]
    block = triton.next_power_of_2(hidden)
    with torch.accelerator.device_index(x.device.index):
        _add_rms_norm[(x.numel() // hidden,)](
            x,
            x if delta is None else delta,
            weight,
            total,
            norm,
            eps,
            HIDDEN=hidden,
            BLOCK=block,
            HAS_DELTA=delta is not None,
            num_warps=8 if block >= 2048 else 4,
        )
    return norm


@triton.jit
def _add_rms_norm(
    x,
    delta,
    weight,
    total,
    norm,
    eps,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_DELTA: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    inside = column < HIDDEN
    place = tl.program_id(0).to(tl.int64) * HIDDEN + column
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_DELTA:
        value += tl.load(delta + place, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + place, rounded, mask=inside)
        value = rounded.to(tl.float32)
    mean_square = tl.sum(value * value, axis=0) / HIDDEN
    value = value * tl.rsqrt(mean_square + eps) * scale
    tl.store(norm + place, value.to(norm.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, both rounded, of the joined projection [..., 2 * inner]: [..., inner]."""
    gate_up = gate_up.contiguous()
    inner = gate_up.shape[-1] // 2
    product = gate_up.new_empty(*gate_up.shape[:-1], inner)
    block = 512
    with torch.accelerator.device_index(gate_up.device.index):
        _silu_mul[(gate_up.numel() // (2 * inner), triton.cdiv(inner, block))](
            gate_up, product, INNER=inner, BLOCK=block, num_warps=2
        )
    return product


@triton.jit
def _silu_mul(gate_up, product, INNER: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < INNER
    place = gate_up + row * (2 * INNER) + column
    gate = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(place + INNER, mask=inside, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(product.dtype.element_ty).to(tl.float32)
    tl.store(product + row * INNER + column, (silu * up).to(product.dtype.element_ty), mask=inside)


def rotate_append_attend(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    start: Tensor,
    position: Tensor,
    heads: int,
    kv_heads: int,
) -> Tensor:
    """Attention [rows, 1, heads * head_dim] of a token of each row; its key and value are stored.

    qkv [rows, 1, (heads + 2 * kv_heads) * head_dim] is the joined projection of the tokens at
    ``position`` int64 [rows] of their requests, whose places begin at ``start`` int64 [rows]. keys
    and values [kv_heads, places, head_dim], of the same dtype or e4m3, are one layer of the cache;
    of each row only positions below its token's are read. cos and sin [positions, head_dim] are
    the rotary tables. Raises ValueError where head_dim is not a power of two of at least 16.
    """
    head_dim = keys.shape[-1]
    if head_dim < MIN_TILE or head_dim & (head_dim - 1):
        raise ValueError(f"head_dim must be a power of two from {MIN_TILE} up, found {head_dim}")
    qkv, group, rows = qkv.contiguous(), heads // kv_heads, qkv.shape[0]
    splits = max(FEWEST_SPLITS, SPLITS // triton.next_power_of_2(rows))
    # Unnormalized sums, their largest scores and their total weights, of each head and split.
    sums = qkv.new_empty(rows, heads, splits, head_dim, dtype=torch.float32)
    weights = qkv.new_empty(2, rows, heads, splits, dtype=torch.float32)
    mixed = qkv.new_empty(rows, 1, heads * head_dim)
    with torch.accelerator.device_index(qkv.device.index):
        _attend_split[(kv_heads, splits, rows)](
            qkv,
            keys,
            values,
            cos,
            sin,
            start,
            position,
            sums,
            weights[0],
            weights[1],
            keys.stride(0),
            keys.stride(1),
            values.stride(0),
            values.stride(1),
            SCALE=math.log2(math.e) / math.sqrt(head_dim),  # the kernel uses powers of two
            KV_HEADS=kv_heads,
            GROUP=group,
            ROWS=max(MIN_TILE, triton.next_power_of_2(group)),
            DIM=head_dim,
            BLOCK=BLOCK_BYTES // qkv.element_size(),
            SPLITS=splits,
            num_warps=4,
            num_stages=3,
        )
        _combine_splits[(rows * heads,)](
            sums, weights[0], weights[1], mixed, DIM=head_dim, SPLITS=splits, num_warps=4
        )
    return mixed


@triton.jit
def _rotated(x, offsets, dim, inside, cos, sin, DIM: tl.constexpr):
    """Rotary embedding of the vectors at x + offsets; ``dim`` counts along their axis.

    Rounded to the dtype after every operation, as ``attention.rotate`` is.
    """
    dtype = x.dtype.element_ty
    is_first = dim < DIM // 2
    partner = tl.where(is_first, dim + DIM // 2, dim - DIM // 2)
    here = tl.load(x + offsets + dim, mask=inside, other=0.0).to(tl.float32)
    there = tl.load(x + offsets + partner, mask=inside, other=0.0).to(tl.float32)
    first = (here * cos).to(dtype).to(tl.float32)
    second = (tl.where(is_first, -there, there) * sin).to(dtype).to(tl.float32)
    return (first + second).to(dtype)


@triton.jit
def _stored(x, dtype: tl.constexpr):
    """x in the dtype of the cache; values too large for e4m3 become its largest number."""
    if dtype == tl.float8e4nv:
        x = tl.clamp(x.to(tl.float32), -448.0, 448.0)
    return x.to(dtype)


@triton.jit
def _attend_block(
    query,
    keys,
    values,
    start,
    filled,
    key_row,
    value_row,
    maximum,
    total,
    mixed,
    SCALE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Maxima, totals and sums after the positions from ``start`` on, below ``filled``."""
    place, dim = start + tl.arange(0, BLOCK), tl.arange(0, DIM)
    seen = place < filled
    place = place.to(tl.int64)[:, None]
    key = tl.load(keys + place * key_row + dim[None, :], mask=seen[:, None], other=0.0)
    value = tl.load(values + place * value_row + dim[None, :], mask=seen[:, None], other=0.0)
    key, value = key.to(query.dtype), value.to(query.dtype)
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * SCALE
    scores = tl.where(seen[None, :], scores, float("-inf"))
    higher = tl.maximum(maximum, tl.max(scores, axis=1))
    weights = tl.exp2(scores - higher[:, None])
    kept = tl.exp2(maximum - higher)
    mixed = mixed * kept[:, None]
    mixed += tl.dot(weights.to(value.dtype), value, input_precision="ieee")
    return higher, total * kept + tl.sum(weights, axis=1), mixed


@triton.jit
def _attend_split(
    qkv,
    keys,
    values,
    cos,
    sin,
    start,
    position,
    sums,
    maxima,
    totals,
    key_head,
    key_row,
    value_head,
    value_row,
    SCALE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One split of the positions of a row, for all query heads that share a key head."""
    kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    request = tl.program_id(2).to(tl.int64)
    at, begins = tl.load(position + request), tl.load(start + request)
    qkv += request * (KV_HEADS * (GROUP + 2) * DIM)
    filled = at.to(tl.int32)  # the positions before the token's own, which is not read
    dim, row = tl.arange(0, DIM), tl.arange(0, ROWS)
    head, inside = kv_head * GROUP + row, row < GROUP
    angles = at * DIM + dim
    cosine, sine = tl.load(cos + angles).to(tl.float32), tl.load(sin + angles).to(tl.float32)
    query = _rotated(
        qkv, head[:, None] * DIM, dim[None, :], inside[:, None], cosine[None, :], sine[None, :], DIM
    )
    keys += kv_head * key_head + begins * key_row
    values += kv_head * value_head + begins * value_row

    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.full([ROWS], 0.0, tl.float32)
    mixed = tl.full([ROWS, DIM], 0.0, tl.float32)
    if split == 0:
        # The token itself, from its projection: its place in the cache is only written.
        key = _rotated(qkv, (KV_HEADS * GROUP + kv_head) * DIM, dim, dim < DIM, cosine, sine, DIM)
        value = tl.load(qkv + (KV_HEADS * (GROUP + 1) + kv_head) * DIM + dim)
        key, value = _stored(key, keys.dtype.element_ty), _stored(value, values.dtype.element_ty)
        tl.store(keys + at * key_row + dim, key)
        tl.store(values + at * value_row + dim, value)
        maximum = tl.sum(query.to(tl.float32) * key.to(tl.float32)[None, :], axis=1) * SCALE
        total = tl.full([ROWS], 1.0, tl.float32)
        mixed += value.to(tl.float32)[None, :]

    span = tl.cdiv(tl.cdiv(filled, SPLITS), BLOCK) * BLOCK
    begin = split * span
    for block in range(begin, tl.minimum(begin + span, filled), BLOCK):
        maximum, total, mixed = _attend_block(
            query, keys, values, block, filled, key_row, value_row, maximum, total, mixed,
            SCALE, DIM, BLOCK,
        )  # fmt: skip

    slot = (request * (KV_HEADS * GROUP) + head) * SPLITS + split
    tl.store(maxima + slot, maximum, mask=inside)
    tl.store(totals + slot, total, mask=inside)
    tl.store(sums + slot[:, None] * DIM + dim[None, :], mixed, mask=inside[:, None])


@triton.jit
def _combine_splits(sums, maxima, totals, out, DIM: tl.constexpr, SPLITS: tl.constexpr):
    """Attention of one head of a row from its splits; those that saw nothing have maximum -inf."""
    slot = tl.program_id(0) * SPLITS + tl.arange(0, SPLITS)
    dim = tl.arange(0, DIM)
    maximum = tl.load(maxima + slot)
    weights = tl.exp2(maximum - tl.max(maximum, axis=0))
    total = tl.sum(tl.load(totals + slot) * weights, axis=0)
    mixed = tl.load(sums + slot[:, None] * DIM + dim[None, :])
    mixed = tl.sum(mixed * weights[:, None], axis=0) / total
    tl.store(out + tl.program_id(0) * DIM + dim, mixed.to(out.dtype.element_ty))
