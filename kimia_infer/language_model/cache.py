"""Static key/value cache of the language model."""

from __future__ import annotations

import torch
from torch import Tensor

from kimia_infer.language_model.config import LanguageModelConfig


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
    ):
        self.capacity = capacity
        shape = (config.total_layers, config.kv_heads, capacity, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty_like(self.keys)
        self.cos, self.sin = rotary_tables(config, capacity, device, dtype)


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
