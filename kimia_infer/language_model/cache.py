"""Static key/value cache of the language model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kimia_infer.language_model.attention import Backend, rotate, split_heads
from kimia_infer.language_model.config import LanguageModelConfig

# Projected queries, keys and values [1, length, rows] of a layer -> [1, length, heads * head_dim].
Attend = Callable[[Tensor, int], Tensor]


class KeyValueCache:
    """Keys (after rotation) and values of every layer, allocated once.

    ``keys`` and ``values`` are [total_layers, kv_heads, capacity, head_dim]: trunk layers first,
    then the MIMO branch. ``cos`` and ``sin`` [capacity, head_dim] are the rotary tables of those
    positions, computed in fp32 and cast to ``dtype``.
    """

    def __init__(
        self,
        config: LanguageModelConfig,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
        backend: Backend,
    ):
        self.capacity, self.backend = capacity, backend
        shape = (config.total_layers, config.kv_heads, capacity, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty_like(self.keys)
        self.cos, self.sin = rotary_tables(config, capacity, device, dtype)

    def at(self, start: int) -> Attend:
        """Attention of positions from ``start`` on, which follow all that is filled."""

        def attend(qkv: Tensor, layer: int) -> Tensor:
            kv_heads, _, head_dim = self.keys[layer].shape
            query, keys, values = split_heads(qkv, kv_heads, head_dim)
            end = start + qkv.shape[1]
            cos, sin = self.cos[start:end], self.sin[start:end]
            self.keys[layer, :, start:end] = rotate(keys[0], cos, sin)
            self.values[layer, :, start:end] = values[0]
            filled = self.keys[layer, None, :, :end], self.values[layer, None, :, :end]
            mixed = self.backend.sequence(rotate(query, cos, sin), *filled)
            return mixed.transpose(1, 2).flatten(2)

        return attend

    def at_position(self, position: Tensor, extent: int) -> Attend:
        """Attention of one token at ``position`` int64 [1], which is below ``extent``."""
        return lambda qkv, layer: self.backend.token(qkv, self, layer, position, extent)


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
