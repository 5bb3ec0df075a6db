"""The key/value cache, and the one place that chooses how attention over it is computed.

Every backend has two forms: of a sequence whose position the host knows, and of a single token
whose position is in a device tensor, with fixed shapes, so that it can be recorded in a graph.
All read grouped keys and values as they are stored; Triton's kernel reads e4m3 as well, for the
others these are widened first.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kimia_infer.layers import operators
from kimia_infer.layers.quantization import FP8, check_fp8
from kimia_infer.utils.errors import ConfigurationError

KV_CACHES: dict[str, torch.dtype | None] = {"none": None, "fp8": FP8}
"""How keys and values can be stored: in the working dtype, or in e4m3."""

BUCKETS = (256, 512, 1024, 2048, 4096)
"""Attention that reads a whole bucket of positions is recorded for these, then the capacity."""

# Joined projections [batch, length, rows], layer -> [batch, length, heads * head_dim].
Attend = Callable[[Tensor, int], Tensor]


class KeyValueCache:
    """Keys (after rotation) and values of every layer, allocated once.

    ``keys`` and ``values`` [layers, kv_heads, slots * capacity, head_dim] are stored in
    ``cache_dtype``, or in ``dtype`` where that is None, and read in ``dtype``. ``cos`` and
    ``sin`` [capacity, head_dim] are the rotary tables of the positions, computed in fp32 and cast
    to ``dtype``. Each of the ``slots`` belongs to one request.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        capacity: int,
        *,
        rope_theta: float,
        device: torch.device,
        dtype: torch.dtype,
        cache_dtype: torch.dtype | None = None,
        slots: int = 1,
    ):
        self.capacity, self.dtype, self.slots = capacity, dtype, slots
        shape = (layers, kv_heads, slots * capacity, head_dim)
        self.keys = torch.empty(shape, device=device, dtype=cache_dtype or dtype)
        self.values = torch.empty_like(self.keys)
        self.cos, self.sin = rotary_tables(head_dim, rope_theta, capacity, device, dtype)

    def clear(self) -> None:
        """Fill with zeros: attention over a whole bucket multiplies unfilled positions by 0."""
        self.keys.zero_()
        self.values.zero_()

    def store(self, layer: int, place: slice | Tensor, keys: Tensor, values: Tensor) -> None:
        """Put keys and values [kv_heads, n, head_dim] at ``place``, a span or int64 [n]."""
        for stored, new in ((self.keys[layer], keys), (self.values[layer], values)):
            if stored.dtype is FP8:
                # Values too large for e4m3 become its largest number, on every device. Bytes are
                # copied because not all operations know the dtype.
                largest = torch.finfo(FP8).max
                new = new.clamp(-largest, largest).to(FP8).view(torch.uint8)
                stored = stored.view(torch.uint8)
            if isinstance(place, slice):
                stored[:, place] = new
            else:
                stored.index_copy_(1, place, new)

    def read(self, layer: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values [slots, kv_heads, end, head_dim] of the first ``end`` positions."""
        keys, values = (
            joined[layer].unflatten(1, (self.slots, self.capacity))[:, :, :end].transpose(0, 1)
            for joined in (self.keys, self.values)
        )
        return keys.to(self.dtype), values.to(self.dtype)

    def places(self, positions: Tensor) -> Tensor:
        """Where :meth:`store` puts one position of each slot, int64 [slots]."""
        if self.slots == 1:
            return positions
        slots = torch.arange(self.slots, device=positions.device)
        return slots * self.capacity + positions

    def slot(self, index: int) -> KeyValueCache:
        """A view of one slot."""
        view, span = copy.copy(self), slice(index * self.capacity, (index + 1) * self.capacity)
        view.slots, view.keys, view.values = 1, self.keys[:, :, span], self.values[:, :, span]
        return view


def check_kv_cache(name: str, device: torch.device) -> None:
    """Raise ConfigurationError, naming alternatives, unless ``device`` supports this cache."""
    if name not in KV_CACHES:
        raise ConfigurationError(f"kv_cache: expected {' or '.join(KV_CACHES)}, found {name!r}")
    if name == "fp8":
        check_fp8("kv_cache", device, "'none'")


def bucket_of(position: int, capacity: int, buckets: Sequence[int] = BUCKETS) -> int:
    """The smallest bucket of positions that contains ``position``."""
    return min(next((b for b in buckets if b > position), capacity), capacity)


def rotary_tables(
    head_dim: int, theta: float, length: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin [length, head_dim] of the half-split rotary embedding with base ``theta``.

    The frequencies are computed in fp32: those stored in the checkpoint are rounded to bf16, and
    the published code ignores them.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / theta**exponents
    angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


@dataclass(frozen=True)
class Backend:
    """An implementation of attention, with scale 1/sqrt(head_dim).

    ``sequence(query, keys, values)``: query [1, heads, length, head_dim] is at the end of keys and
    values [1, kv_heads, total, head_dim]; returns the shape of query. Each query sees the keys up
    to its own position.
    ``token(qkv, cache, layer, position, bucket)``: qkv [slots, 1, rows] of the joined projection
    at ``position`` int64 [slots]; stores keys and values and returns [slots, 1, heads * head_dim].
    Every position is below ``bucket``, which bounds the positions that are read. Only ``"sdpa"``
    takes more than one slot. With ``reads_filled`` only filled positions are read, so that one
    bucket, the capacity, is enough.
    """

    name: str
    sequence: Callable[[Tensor, Tensor, Tensor], Tensor]
    token: Callable[[Tensor, KeyValueCache, int, Tensor, int], Tensor]
    reads_filled: bool


class CachedAttention:
    """A backend that works on the cache of one request."""

    def __init__(self, backend: Backend, cache: KeyValueCache):
        self.backend, self.cache = backend, cache

    def at(self, start: int) -> Attend:
        """Attention of positions from ``start`` on; those before are filled."""
        cache = self.cache

        def attend(qkv: Tensor, layer: int) -> Tensor:
            kv_heads, _, head_dim = cache.keys[layer].shape
            query, keys, values = split_heads(qkv, kv_heads, head_dim)
            end = start + qkv.shape[1]
            cos, sin = cache.cos[start:end], cache.sin[start:end]
            cache.store(layer, slice(start, end), rotate(keys[0], cos, sin), values[0])
            mixed = self.backend.sequence(rotate(query, cos, sin), *cache.read(layer, end))
            return mixed.transpose(1, 2).flatten(2)

        return attend

    def at_position(self, position: Tensor, bucket: int) -> Attend:
        """Attention of one token at ``position`` int64 [1], which is below ``bucket``."""
        return lambda qkv, layer: self.backend.token(qkv, self.cache, layer, position, bucket)


def choose_backend(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    name: str | None = None,
    cache_dtype: torch.dtype | None = None,
) -> Backend:
    """The backend called ``name``, or the best one for tensors of this kind.

    ``cache_dtype`` is the dtype of the cache, None for ``dtype``. Raises ConfigurationError for a
    name that is unknown, or that cannot be used, with what is missing.
    """
    if name is not None and name not in BACKENDS:
        raise ConfigurationError(
            f"attention: expected one of {', '.join(BACKENDS)}, found {name!r}"
        )
    lacking = None
    for candidate in BACKENDS if name is None else [name]:
        lacking = _LACKING[candidate](device, dtype, head_dim, cache_dtype)
        if lacking is None:
            return BACKENDS[candidate]
    raise ConfigurationError(
        f"attention: {name!r} cannot be used here, {lacking}; leave it out to use the best one"
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [..., length, head_dim]; the two halves of head_dim form pairs."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def split_heads(qkv: Tensor, kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [batch, heads, length, head_dim] of qkv [batch, length, rows]."""
    heads = qkv.unflatten(-1, (-1, head_dim)).transpose(1, 2)
    query, key, value = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    return query, key, value


def _sdpa_sequence(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    length, total = query.shape[2], keys.shape[2]
    mask = None
    if 1 < length < total:
        mask = torch.ones(length, total, dtype=torch.bool, device=query.device)
        mask = mask.tril(total - length)
    return F.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, is_causal=length == total > 1, enable_gqa=True
    )


def _sdpa_token(
    qkv: Tensor, cache: KeyValueCache, layer: int, position: Tensor, bucket: int
) -> Tensor:
    # Query heads that share a key head take the place of a sequence: [slots, kv, group, dim].
    query = _store(qkv, cache, layer, position).squeeze(2).unflatten(1, (cache.keys.shape[1], -1))
    seen = torch.arange(bucket, device=qkv.device) <= position[:, None, None, None]
    mixed = F.scaled_dot_product_attention(
        query, *cache.read(layer, bucket), attn_mask=seen.expand(-1, 1, query.shape[2], -1)
    )
    return mixed.flatten(1)[:, None]


def _flash_sequence(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    from flash_attn import flash_attn_func  # pyrefly: ignore[missing-import]

    # flash-attn aligns the causal mask to the end of the keys, as wanted here.
    out = flash_attn_func(
        query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), causal=True
    )
    return out.transpose(1, 2)


def _flash_token(
    qkv: Tensor, cache: KeyValueCache, layer: int, position: Tensor, bucket: int
) -> Tensor:
    from flash_attn import flash_attn_with_kvcache  # pyrefly: ignore[missing-import]

    query = _store(qkv, cache, layer, position)
    out = flash_attn_with_kvcache(
        query.transpose(1, 2),
        cache.keys[layer, None].transpose(1, 2),
        cache.values[layer, None].transpose(1, 2),
        cache_seqlens=(position + 1).int(),
    )
    return out.reshape(1, 1, -1)


rotate_append_attend = operators.kernel_operator(
    "rotate_append_attend(Tensor qkv, Tensor(a!) keys, Tensor(b!) values, Tensor cos, Tensor sin,"
    " Tensor position, int heads, int kv_heads) -> Tensor",
    "attention_kernels.rotate_append_attend",
    fake=lambda qkv, keys, values, cos, sin, position, heads, kv_heads: qkv.new_empty(
        1, 1, heads * keys.shape[-1]
    ),
)


def _triton_token(
    qkv: Tensor, cache: KeyValueCache, layer: int, position: Tensor, bucket: int
) -> Tensor:
    kv_heads, _, head_dim = cache.keys[layer].shape
    heads = qkv.shape[-1] // head_dim - 2 * kv_heads
    return rotate_append_attend(
        qkv, cache.keys[layer], cache.values[layer], cache.cos, cache.sin, position, heads, kv_heads
    )


def _store(qkv: Tensor, cache: KeyValueCache, layer: int, position: Tensor) -> Tensor:
    """Store key and value of one token per slot; its rotated query [slots, heads, 1, dim]."""
    query, keys, values = split_heads(qkv, cache.keys.shape[1], cache.keys.shape[-1])
    cos, sin = cache.cos[position, None, None], cache.sin[position, None, None]
    keys, values = rotate(keys, cos, sin).squeeze(2), values.squeeze(2)
    cache.store(layer, cache.places(position), keys.transpose(0, 1), values.transpose(0, 1))
    return rotate(query, cos, sin)


def _lacks_flash(
    device: torch.device, dtype: torch.dtype, head_dim: int, cache_dtype: torch.dtype | None
) -> str | None:
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in bfloat16 on CUDA devices, not in {dtype} on {device}"
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed"
    if cache_dtype is not None:
        return f"it reads keys and values in {dtype}, not in {cache_dtype}"
    return None


def _lacks_triton(
    device: torch.device, dtype: torch.dtype, head_dim: int, cache_dtype: torch.dtype | None
) -> str | None:
    if head_dim < 16 or head_dim & (head_dim - 1):
        return f"its kernel needs a head size of 16, 32, 64 or 128, not {head_dim}"
    return operators.missing(device)


BACKENDS = {
    # The best one first. Triton's kernel also rotates and stores, so it leads flash-attn.
    "triton": Backend("triton", _sdpa_sequence, _triton_token, reads_filled=True),
    "flash-attn": Backend("flash-attn", _flash_sequence, _flash_token, reads_filled=True),
    "sdpa": Backend("sdpa", _sdpa_sequence, _sdpa_token, reads_filled=False),
}
_LACKING: dict[str, Callable[[torch.device, torch.dtype, int, torch.dtype | None], str | None]] = {
    "triton": _lacks_triton,
    "flash-attn": _lacks_flash,
    "sdpa": lambda device, dtype, head_dim, cache_dtype: None,
}
