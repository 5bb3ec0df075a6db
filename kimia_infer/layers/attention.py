"""The one place that chooses how attention is computed.

Every backend has two forms: of a sequence whose place the host knows, and of a single token
whose place stands in a device tensor, with fixed shapes, so that it can be recorded in a graph.
All read grouped keys and values as they are stored, Triton's kernel those in e4m3 as well; for
the others these are widened first.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kimia_infer.layers import triton_support
from kimia_infer.layers.cache import KeyValueCache
from kimia_infer.utils.errors import RequestError

# Joined projections [batch, length, rows] of a layer -> [batch, length, heads * head_dim].
Attend = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Backend:
    """An implementation of attention.

    ``sequence(query, keys, values)``: query [1, heads, length, head_dim] stands at the end of
    keys and values [1, kv_heads, total, head_dim]; returns the shape of query. Each query sees
    the keys up to its own position.
    ``token(qkv, cache, layer, position, extent)``: qkv [1, 1, rows] of the joined projection at
    ``position`` int64 [1]; stores its key and value and returns [1, 1, heads * head_dim]. All
    positions up to its own are below ``extent``. With ``any_extent`` that limit costs nothing.
    That of ``"sdpa"`` also takes a cache with slots, and a token of each: 1 is their number then.
    Scale 1/sqrt(head_dim).
    """

    name: str
    sequence: Callable[[Tensor, Tensor, Tensor], Tensor]
    token: Callable[[Tensor, KeyValueCache, int, Tensor, int], Tensor]
    any_extent: bool


class CachedAttention:
    """A backend at work on the cache of one request."""

    def __init__(self, backend: Backend, cache: KeyValueCache):
        self.backend, self.cache = backend, cache

    def at(self, start: int) -> Attend:
        """Attention of positions from ``start`` on, which follow all that is filled."""
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

    def at_position(self, position: Tensor, extent: int) -> Attend:
        """Attention of one token at ``position`` int64 [1], which is below ``extent``."""
        return lambda qkv, layer: self.backend.token(qkv, self.cache, layer, position, extent)


def choose_backend(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    name: str | None = None,
    held: torch.dtype | None = None,
) -> Backend:
    """The backend called ``name``, or the best one for tensors of this kind.

    ``held`` is the dtype that the cache keeps keys and values in, None for ``dtype``.
    Raises RequestError, saying what is lacking, for a name that is unknown or cannot be used.
    """
    if name is not None and name not in BACKENDS:
        raise RequestError(f"attention: expected one of {', '.join(BACKENDS)}, found {name!r}")
    for candidate in BACKENDS if name is None else [name]:
        lacking = _LACKING[candidate](device, dtype, head_dim, held)
        if lacking is None:
            return BACKENDS[candidate]
    raise RequestError(f"attention: {name!r} cannot be used here, {lacking}; leave it to choose")


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [..., length, head_dim]; the two halves of head_dim form pairs."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def split_heads(qkv: Tensor, kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [batch, heads, length, head_dim] of qkv [batch, length, rows]."""
    heads = qkv.unflatten(-1, (-1, head_dim)).transpose(1, 2)
    return heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)


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
    qkv: Tensor, cache: KeyValueCache, layer: int, position: Tensor, extent: int
) -> Tensor:
    # The query heads that share a key head stand where a sequence would: [slots, kv, group, dim].
    query = _store(qkv, cache, layer, position).squeeze(2).unflatten(1, (cache.keys.shape[1], -1))
    seen = torch.arange(extent, device=qkv.device) <= position[:, None, None, None]
    mixed = F.scaled_dot_product_attention(
        query, *cache.read(layer, extent), attn_mask=seen.expand(-1, 1, query.shape[2], -1)
    )
    return mixed.flatten(1)[:, None]


def _flash_sequence(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    # flash-attn aligns the causal mask to the end of the keys, as wanted here.
    out = flash_attn_func(
        query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), causal=True
    )
    return out.transpose(1, 2)


def _flash_token(
    qkv: Tensor, cache: KeyValueCache, layer: int, position: Tensor, extent: int
) -> Tensor:
    from flash_attn import flash_attn_with_kvcache

    query = _store(qkv, cache, layer, position)
    out = flash_attn_with_kvcache(
        query.transpose(1, 2),
        cache.keys[layer, None].transpose(1, 2),
        cache.values[layer, None].transpose(1, 2),
        cache_seqlens=(position + 1).int(),
    )
    return out.reshape(1, 1, -1)


def _triton_token(
    qkv: Tensor, cache: KeyValueCache, layer: int, position: Tensor, extent: int
) -> Tensor:
    from kimia_infer.layers.attention_kernels import rotate_append_attend

    kv_heads, _, head_dim = cache.keys[layer].shape
    heads = qkv.shape[-1] // head_dim - 2 * kv_heads
    return rotate_append_attend(
        qkv, cache.keys[layer], cache.values[layer], cache.cos, cache.sin, position, heads, kv_heads
    )


def _store(qkv: Tensor, cache: KeyValueCache, layer: int, position: Tensor) -> Tensor:
    """Put key and value of a token in their place; its rotated query [slots, heads, 1, dim]."""
    query, keys, values = split_heads(qkv, cache.keys.shape[1], cache.keys.shape[-1])
    cos, sin = cache.cos[position, None, None], cache.sin[position, None, None]
    keys, values = rotate(keys, cos, sin).squeeze(2), values.squeeze(2)
    cache.store(layer, cache.places(position), keys.transpose(0, 1), values.transpose(0, 1))
    return rotate(query, cos, sin)


def _lacks_flash(
    device: torch.device, dtype: torch.dtype, head_dim: int, held: torch.dtype | None
) -> str | None:
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in bfloat16 on CUDA devices, not in {dtype} on {device}"
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed"
    if held is not None:
        return f"it reads keys and values in {dtype}, not in {held}"
    return None


def _lacks_triton(
    device: torch.device, dtype: torch.dtype, head_dim: int, held: torch.dtype | None
) -> str | None:
    if head_dim < 16 or head_dim & (head_dim - 1):
        return f"its kernel needs a head size of 16, 32, 64 or 128, not {head_dim}"
    return triton_support.missing(device)


BACKENDS = {
    # The best one first. Triton's kernel also rotates and stores, so it leads flash-attn.
    "triton": Backend("triton", _sdpa_sequence, _triton_token, any_extent=True),
    "flash-attn": Backend("flash-attn", _flash_sequence, _flash_token, any_extent=True),
    "sdpa": Backend("sdpa", _sdpa_sequence, _sdpa_token, any_extent=False),
}
_LACKING: dict[str, Callable[[torch.device, torch.dtype, int, torch.dtype | None], str | None]] = {
    "triton": _lacks_triton,
    "flash-attn": _lacks_flash,
    "sdpa": lambda device, dtype, head_dim, held: None,
}
