"""The key/value cache, and the one place that chooses how attention over it is computed.

Where the host knows the positions, PyTorch's attention reads what is filled. Where it does not, in
recorded steps of fixed shapes, a backend reads them on the device: Triton's kernel, or PyTorch's
attention over a copy of a whole bucket of places. Triton's kernel reads e4m3; for PyTorch's it is
widened first.
"""

from __future__ import annotations

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

FLASH_CAPABILITY = (8, 0)
"""The first CUDA devices that FlashAttention is made for: Ampere."""

# Joined projections [batch, length, rows], layer -> [batch, length, heads * head_dim].
Attend = Callable[[Tensor, int], Tensor]


class KeyValueCache:
    """Keys (after rotation) and values of every layer for ``places`` tokens, allocated once.

    All requests share it: each has a span of places, and its token at position p stands at the
    start of the span plus p. ``keys`` and ``values`` [layers, kv_heads, places, head_dim] are
    stored in ``cache_dtype``, or in ``dtype`` where that is None, and read in ``dtype``. ``cos``
    and ``sin`` [positions, head_dim] are the rotary tables of the positions of the longest
    request, computed in fp32 and cast to ``dtype``.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        places: int,
        positions: int,
        *,
        rope_theta: float,
        device: torch.device,
        dtype: torch.dtype,
        cache_dtype: torch.dtype | None = None,
    ):
        self.places, self.dtype = places, dtype
        shape = (layers, kv_heads, places, head_dim)
        self.keys = torch.empty(shape, device=device, dtype=cache_dtype or dtype)
        self.values = torch.empty_like(self.keys)
        self.cos, self.sin = rotary_tables(head_dim, rope_theta, positions, device, dtype)

    @property
    def positions(self) -> int:
        """Positions of the longest request."""
        return self.cos.shape[0]

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

    def read(self, layer: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values [1, kv_heads, end - start, head_dim] of the places from ``start``."""
        keys, values = self.keys[layer, None, :, start:end], self.values[layer, None, :, start:end]
        return keys.to(self.dtype), values.to(self.dtype)

    def gather(self, layer: int, start: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [rows, kv_heads, n, head_dim] of n places from ``start`` int64 [rows].

        They are 0 where ``seen`` bool [rows, n] does not hold: those may belong to others, or to
        nobody, and what is multiplied by 0 has to be finite.
        """
        rows, count = seen.shape
        places = start[:, None] + torch.arange(count, device=start.device)
        # A span near the end may be shorter than what is read of it.
        places = places.clamp(max=self.places - 1).flatten()

        def read(stored: Tensor) -> Tensor:
            narrow = stored.view(torch.uint8) if stored.dtype is FP8 else stored
            found = narrow.index_select(1, places).view(stored.dtype).to(self.dtype)
            found = found.unflatten(1, (rows, count)).transpose(0, 1)
            return found.masked_fill(~seen[:, None, :, None], 0)

        return read(self.keys[layer]), read(self.values[layer])


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
    """How a token of every row is attended where the host knows no positions.

    ``tokens(qkv, cache, layer, start, position, bucket)``: qkv [rows, 1, n] of the joined
    projection; each row's span of places begins at ``start`` int64 [rows], and its token is at
    ``position`` int64 [rows], below ``bucket``. Stores keys and values and returns [rows, 1,
    heads * head_dim], with scale 1/sqrt(head_dim). With ``reads_filled`` only filled places are
    read, so that one bucket, all positions, is enough.
    """

    name: str
    tokens: Callable[[Tensor, KeyValueCache, int, Tensor, Tensor, int], Tensor]
    reads_filled: bool


class CachedAttention:
    """Attention of requests whose keys and values are in ``cache``."""

    def __init__(self, backend: Backend, cache: KeyValueCache):
        self.backend, self.cache = backend, cache

    def sequence(self, start: int, position: int) -> Attend:
        """Attention of tokens from ``position`` on of the request whose span is at ``start``.

        The positions before are filled; each token sees those up to its own.
        """
        cache = self.cache

        def attend(qkv: Tensor, layer: int) -> Tensor:
            query, keys, values = split_heads(qkv, *cache.keys.shape[1::2])
            end = position + qkv.shape[1]
            cos, sin = cache.cos[position:end], cache.sin[position:end]
            places = slice(start + position, start + end)
            cache.store(layer, places, rotate(keys[0], cos, sin), values[0])
            filled = cache.read(layer, start, start + end)
            return _causal(rotate(query, cos, sin), *filled).transpose(1, 2).flatten(2)

        return attend

    def tokens(self, starts: Sequence[int], positions: Sequence[int]) -> Attend:
        """Attention of one token for every row, at the given positions of the given spans."""
        cache = self.cache
        starting, at = (torch.tensor(given).to(cache.keys.device) for given in (starts, positions))
        cos, sin = (table[at][:, None, None] for table in (cache.cos, cache.sin))
        places = starting + at
        spans = [(start, start + p + 1) for start, p in zip(starts, positions, strict=True)]

        def attend(qkv: Tensor, layer: int) -> Tensor:
            query, keys, values = split_heads(qkv, *cache.keys.shape[1::2])
            query, keys = rotate(query, cos, sin), rotate(keys, cos, sin)
            cache.store(layer, places, *(x.squeeze(2).transpose(0, 1) for x in (keys, values)))
            rows = [
                _causal(query[row : row + 1], *cache.read(layer, *span))
                for row, span in enumerate(spans)
            ]
            return torch.cat(rows).flatten(1)[:, None]

        return attend

    def recorded_tokens(self, start: Tensor, position: Tensor, bucket: int) -> Attend:
        """As :meth:`tokens`, of fixed shapes, with ``start`` and ``position`` on the device."""
        tokens, cache = self.backend.tokens, self.cache
        return lambda qkv, layer: tokens(qkv, cache, layer, start, position, bucket)


def choose_backend(device: torch.device, head_dim: int, name: str | None = None) -> Backend:
    """The backend called ``name``, or the best one on ``device``.

    Raises ConfigurationError for a name that is unknown, or that cannot be used, with what is
    missing.
    """
    if name is not None and name not in BACKENDS:
        raise ConfigurationError(
            f"attention: expected one of {', '.join(BACKENDS)}, found {name!r}"
        )
    lacking = _lacks_triton(device, head_dim)
    if name == "triton" and lacking is not None:
        raise ConfigurationError(
            f"attention: 'triton' cannot be used here, {lacking}; leave it out to use the best one"
        )
    return BACKENDS[name or ("triton" if lacking is None else "sdpa")]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [..., length, head_dim]; the two halves of head_dim form pairs."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def split_heads(qkv: Tensor, kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [batch, heads, length, head_dim] of qkv [batch, length, rows]."""
    heads = qkv.unflatten(-1, (-1, head_dim)).transpose(1, 2)
    query, key, value = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    return query, key, value


def _causal(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of query [1, heads, length, head_dim] at the end of keys and values.

    These are [1, kv_heads, total, head_dim]; each query sees the keys up to its own position.
    """
    length, total = query.shape[2], keys.shape[2]
    mask = None
    if 1 < length < total:
        if _has_flash_attention(query):
            # With a mask PyTorch may compute a float32 matrix of all scores instead. Here, as in
            # torch.nn.attention.bias, is_causal means aligned to the end.
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            return flash(query, keys, values, is_causal=True)[0]
        mask = torch.ones(length, total, dtype=torch.bool, device=query.device)
        mask = mask.tril(total - length)
    return F.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, is_causal=length == total > 1, enable_gqa=True
    )


def _has_flash_attention(query: Tensor) -> bool:
    """Whether PyTorch's FlashAttention can be called with ``query`` and keys of its kind."""
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] % 8 == 0
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(query.device) >= FLASH_CAPABILITY
    )


def _sdpa_tokens(
    qkv: Tensor, cache: KeyValueCache, layer: int, start: Tensor, position: Tensor, bucket: int
) -> Tensor:
    _, kv_heads, _, head_dim = cache.keys.shape
    query, keys, values = split_heads(qkv, kv_heads, head_dim)
    cos, sin = cache.cos[position, None, None], cache.sin[position, None, None]
    keys = rotate(keys, cos, sin)
    new = (x.squeeze(2).transpose(0, 1) for x in (keys, values))
    cache.store(layer, start + position, *new)
    # Query heads that share a key head take the place of a sequence: [rows, kv, group, dim].
    query = rotate(query, cos, sin).squeeze(2).unflatten(1, (kv_heads, -1))
    seen = torch.arange(bucket, device=qkv.device) <= position[:, None]
    mask = seen[:, None, None].expand(-1, 1, query.shape[2], -1)
    filled = cache.gather(layer, start, seen)
    mixed = F.scaled_dot_product_attention(query, *filled, attn_mask=mask)
    return mixed.flatten(1)[:, None]


rotate_append_attend = operators.kernel_operator(
    "rotate_append_attend(Tensor qkv, Tensor(a!) keys, Tensor(b!) values, Tensor cos, Tensor sin,"
    " Tensor start, Tensor position, int heads, int kv_heads) -> Tensor",
    "attention_kernels.rotate_append_attend",
    fake=lambda qkv, keys, values, cos, sin, start, position, heads, kv_heads: qkv.new_empty(
        qkv.shape[0], 1, heads * keys.shape[-1]
    ),
)


def _triton_tokens(
    qkv: Tensor, cache: KeyValueCache, layer: int, start: Tensor, position: Tensor, bucket: int
) -> Tensor:
    kv_heads, _, head_dim = cache.keys[layer].shape
    heads = qkv.shape[-1] // head_dim - 2 * kv_heads
    stored = cache.keys[layer], cache.values[layer]
    return rotate_append_attend(
        qkv, *stored, cache.cos, cache.sin, start, position, heads, kv_heads
    )


def _lacks_triton(device: torch.device, head_dim: int) -> str | None:
    if head_dim < 16 or head_dim & (head_dim - 1):
        return f"its kernel needs a head size of 16, 32, 64 or 128, not {head_dim}"
    return operators.missing(device)


BACKENDS = {
    "triton": Backend("triton", _triton_tokens, reads_filled=True),
    "sdpa": Backend("sdpa", _sdpa_tokens, reads_filled=False),
}
