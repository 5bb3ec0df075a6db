"""Adapters of low rank (LoRA) in training; ``weights/adapter.py`` describes what is stored."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kimia_infer.training.config import AdapterConfig
from kimia_infer.utils.errors import ConfigurationError

if TYPE_CHECKING:  # peft takes seconds to import, and only adapters need it
    from peft import LoraConfig

BASE, ADAPTER = ".base_layer", ".default"
"""Parts of the names that peft gives to an adapted layer and to the parameters of its adapter."""

_DECODER = {
    "attention": r"attention\.(qkv|output)",
    "feed_forward": r"feed_forward\.(gate_up|down)",
}
_ENCODER = {"attention": r"self_attn\.([qkv]|out)_proj", "feed_forward": "fc[12]"}
_PLACES = {
    "trunk": (r"language_model\.layers\.\d+\.", _DECODER),
    "mimo": (r"language_model\.mimo_layers\.\d+\.", _DECODER),
    "whisper": (r"whisper\.layers\.\d+\.", _ENCODER),
    "adaptor": (r"language_model\.adaptor\.(input|output)", None),
    "heads": (r"language_model\.(text|audio)_head", None),
}
"""Patterns of the layers that can have adapters, by kind where there is a choice."""


def lora_config(settings: AdapterConfig, parts: Sequence[str], base: str) -> LoraConfig:
    """peft's configuration; ``base`` is stored as the model that the adapter belongs to.

    Raises:
        ConfigurationError: one of ``parts`` has no linear layers.
    """
    for part in parts:
        if part not in _PLACES:
            raise ConfigurationError(
                f"parts: {part!r} has no linear layers to adapt; lora takes {', '.join(_PLACES)}"
            )
    from peft import LoraConfig

    patterns = []
    for part in parts:
        place, kinds = _PLACES[part]
        choice = "" if kinds is None else "|".join(kinds[name] for name in settings.layers)
        patterns.append(f"{place}({choice})" if choice else place)
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # pyrefly: ignore[bad-argument-type]
        lora_dropout=settings.dropout,
        target_modules="|".join(patterns),
        base_model_name_or_path=base,
    )


def first_adapter_value(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """How an adapter begins, by the name of its parameter: A as a linear layer, B as zeros.

    The value does not depend on how many processes there are.
    """
    if ".lora_B." in name:
        return torch.zeros(tuple(shape))
    generator = torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode()))
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return torch.empty(tuple(shape)).uniform_(-bound, bound, generator=generator)
