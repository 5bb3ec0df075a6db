"""Check that a model fits in the memory of its device, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from kimia_infer.api.parameters import BUDGETS
from kimia_infer.layers.attention import KV_CACHES, check_kv_cache
from kimia_infer.layers.quantization import SCHEMES, check_quantization, stored_build
from kimia_infer.models.kimi_audio.config import LanguageModelConfig
from kimia_infer.models.kimi_audio.language_model import LanguageModel
from kimia_infer.utils.errors import ConfigurationError

GB = 10**9
RESERVE = 1 * GB
"""Bytes for recorded graphs, workspaces of libraries and fragmentation of the allocator."""

STREAMS = 6
"""Tensors [positions, hidden_size] that are alive in a feed-forward: the residual stream and what
is added to it, at the fork and below, its norm and the result."""

SHARED = ("cpu", "mps")
"""Devices that use the memory of the host, whose free size is not checked."""


@dataclass(frozen=True)
class MemoryPlan:
    """What is to be loaded; ``encoders`` and ``detokenizer`` are bytes of weights.

    With ``offload`` one encoder at a time is on the device, and none while a prompt is read.
    ``stored`` is how the weights of the checkpoint are quantized, which is how they are loaded.
    """

    config: LanguageModelConfig
    dtype: torch.dtype
    kv_cache: str
    encoders: tuple[int, ...]
    detokenizer: int
    offload: bool = False
    stored: str = "none"

    def needed(self, scheme: str, speech: bool) -> int:
        """Bytes while the longest prompt is read, RESERVE included."""
        weights = weight_bytes(language_model(self.config, scheme), self.dtype)
        spoken = self.detokenizer if speech else 0
        encoders, work = sum(self.encoders), self.work_bytes(scheme)
        if self.offload:
            encoders, work = 0, max(work, *self.encoders)
        return weights + encoders + spoken + self.cache_bytes() + work + RESERVE

    def cache_bytes(self) -> int:
        """Bytes of the key/value cache of the longest request."""
        config, stored = self.config, KV_CACHES[self.kv_cache] or self.dtype
        values = 2 * config.total_layers * config.kv_heads * config.head_dim
        return max(BUDGETS.values()) * values * stored.itemsize

    def work_bytes(self, scheme: str) -> int:
        """Bytes of the largest feed-forward: gate and up joined, their product, and the input."""
        config, positions = self.config, max(BUDGETS.values())
        row = 4 * config.intermediate_size + STREAMS * config.hidden_size
        matrix = 0
        if scheme != "none":  # gate and up in the working dtype; int4 is unpacked to bytes first
            values = 2 * config.intermediate_size * config.hidden_size
            matrix = values * (self.dtype.itemsize + (scheme == "int4"))
        return positions * row * self.dtype.itemsize + matrix

    def check(self, scheme: str, speech: bool, device: torch.device, free: int) -> None:
        """Raise ConfigurationError, naming what would fit, unless ``free`` bytes are enough."""
        needed = self.needed(scheme, speech)
        if needed <= free:
            return
        others = " or ".join(self._alternatives(speech, device, free))
        raise ConfigurationError(
            f"memory: {self._described(scheme, speech)} needs {needed / GB:.1f} GB, and {device} "
            f"has {free / GB:.1f} GB free; {f'use {others}' if others else 'nothing smaller fits'}"
        )

    def _alternatives(self, speech: bool, device: torch.device, free: int) -> list[str]:
        """What would fit: with speech if asked for, else without.

        The stored quantization comes first, then a narrow cache, then offloading, then both.
        """
        schemes = [
            scheme
            for scheme in SCHEMES
            if _possible(check_quantization, scheme, device)
            and _possible(language_model, self.config, scheme)
        ]
        caches = [self.kv_cache, *(["fp8"] if _possible(check_kv_cache, "fp8", device) else [])]
        given = product(
            (True, False) if speech else (False,),
            [schemes] if self.stored == "none" else [[self.stored], schemes],
            [replace(self, offload=off, kv_cache=c) for off in (False, True) for c in caches],
        )
        for spoken, loaded, plan in given:
            fitting = [
                f"{plan._described(scheme, spoken)} ({needed / GB:.1f} GB)"
                for scheme in loaded
                if (needed := plan.needed(scheme, spoken)) <= free
            ]
            if fitting:
                return fitting
        return []

    def _described(self, scheme: str, speech: bool) -> str:
        words = [f"quantization {scheme!r}"]
        if self.stored not in ("none", scheme):
            words.append("of the checkpoint that this one was made from")
        if self.kv_cache != "none":
            words.append(f"and kv_cache {self.kv_cache!r}")
        if self.offload:
            words.append("and offload 'encoders'")
        alone = "text alone (load_detokenizer=False, in a service KIMI_AUDIO_OUTPUT=text)"
        return " ".join([*words, "with", "text and speech" if speech else alone])


def language_model(config: LanguageModelConfig, scheme: str) -> LanguageModel:
    """The model quantized with ``scheme``, without values."""
    with torch.device("meta"):
        return stored_build(lambda: LanguageModel(config), scheme)()


def weight_bytes(module: torch.nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the parameters of ``module`` served in ``dtype``, which replaces float32 only."""
    return sum(
        p.numel() * (dtype if p.dtype is torch.float32 else p.dtype).itemsize
        for p in module.parameters()
    )


def free_memory(device: torch.device) -> int | None:
    """Free bytes of ``device``; None if it uses the memory of the host."""
    if device.type in SHARED:
        return None
    torch.accelerator.empty_cache()  # of a model that was loaded before
    return torch.accelerator.get_memory_info(device)[0]


def _possible(check: Callable[..., object], *given: Any) -> bool:
    try:
        check(*given)
    except ConfigurationError:
        return False
    return True
