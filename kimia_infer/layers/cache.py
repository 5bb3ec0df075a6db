"""Static key/value cache of the language model."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from kimia_infer.layers.quantization import FP8, check_fp8
from kimia_infer.models.kimi_audio.config import LanguageModelConfig
from kimia_infer.utils.errors import RequestError

KV_CACHES: dict[str, torch.dtype | None] = {"none": None, "fp8": FP8}
"""How keys and values can be held: in the working dtype, or in e4m3."""


class KeyValueCache:
    """Keys (after rotation) and values of every layer, allocated once.

    ``keys`` and ``values`` are [total_layers, kv_heads, slots * capacity, head_dim]: trunk layers
    first, then the MIMO branch; ``dtype`` is that of what is stored and read, ``held`` another one
    to keep it in. ``cos`` and ``sin`` [capacity, head_dim] are the rotary tables of those
    positions, computed in fp32 and cast to ``dtype``. Each of the ``slots`` has its own request.
    """

    def __init__(
        self,
        config: LanguageModelConfig,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
        held: torch.dtype | None = None,
        slots: int = 1,
    ):
        self.capacity, self.dtype, self.slots = capacity, dtype, slots
        shape = (config.total_layers, config.kv_heads, slots * capacity, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=held or dtype)
        self.values = torch.empty_like(self.keys)
        self.cos, self.sin = rotary_tables(config, capacity, device, dtype)

    def store(self, layer: int, place: slice | Tensor, keys: Tensor, values: Tensor) -> None:
        """Put keys and values [kv_heads, n, head_dim] at ``place``, a span or int64 [n]."""
        for held, new in ((self.keys[layer], keys), (self.values[layer], values)):
            if held.dtype is FP8:
                # What is too large for e4m3 becomes its largest number, on every device; and
                # bytes can be copied where not all operations know the dtype.
                largest = torch.finfo(FP8).max
                new = new.clamp(-largest, largest).to(FP8).view(torch.uint8)
                held = held.view(torch.uint8)
            if isinstance(place, slice):
                held[:, place] = new
            else:
                held.index_copy_(1, place, new)

    def read(self, layer: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values [slots, kv_heads, end, head_dim] of the first ``end`` positions."""
        keys, values = (
            joined[layer].unflatten(1, (self.slots, self.capacity))[:, :, :end].transpose(0, 1)
            for joined in (self.keys, self.values)
        )
        return keys.to(self.dtype), values.to(self.dtype)

    def places(self, positions: Tensor) -> Tensor:
        """Where :meth:`store` has these positions of the slots, int64 [slots]."""
        if self.slots == 1:
            return positions
        slots = torch.arange(self.slots, device=positions.device)
        return slots * self.capacity + positions

    def slot(self, index: int) -> KeyValueCache:
        """The part of one slot, by itself."""
        part, span = copy.copy(self), slice(index * self.capacity, (index + 1) * self.capacity)
        part.slots, part.keys, part.values = 1, self.keys[:, :, span], self.values[:, :, span]
        return part


def check_kv_cache(name: str, device: torch.device) -> None:
    """Raise RequestError, naming what else can be used, unless ``device`` can have this cache."""
    if name not in KV_CACHES:
        raise RequestError(f"kv_cache: expected {' or '.join(KV_CACHES)}, found {name!r}")
    if name == "fp8":
        check_fp8("kv_cache", device, "'none'")


def rotary_tables(
    config: LanguageModelConfig, length: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin [length, head_dim] of the half-split rotary embedding.

    The frequencies come from ``rope_theta`` in fp32: those stored in the checkpoint are
    rounded to bf16 and the published code ignores them.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)
