"""Adapters of low rank (LoRA) on the language model and the Whisper encoder.

An adapter directory is peft's: ``adapter_config.json`` and ``adapter_model.safetensors``, for
the module :class:`TrainingNetwork`. Joined matrices (queries, keys and values; gate and up)
have one adapter each.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor

from kimia_infer.language_model.model import LanguageModel
from kimia_infer.training.config import ConfigError, LoraSettings
from kimia_infer.training.network import TrainingNetwork
from kimia_infer.weights.checkpoint import CheckpointError

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What peft puts before the names of an adapter's tensors."""

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
"""Patterns of the layers of each part that can have adapters, by kind where there is a choice."""


def lora_config(settings: LoraSettings, parts: Sequence[str], base: str) -> LoraConfig:
    """What peft needs to know; ``base`` is noted as the model that the adapter belongs to."""
    for part in parts:
        if part not in _PLACES:
            raise ConfigError(
                f"parts: {part!r} has no linear layers to adapt; lora takes {', '.join(_PLACES)}"
            )
    patterns = []
    for part in parts:
        place, kinds = _PLACES[part]
        choice = "" if kinds is None else "|".join(kinds[name] for name in settings.layers)
        patterns.append(f"{place}({choice})" if choice else place)
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules="|".join(patterns),
        base_model_name_or_path=base,
    )


def add_adapters(network: TrainingNetwork, config: LoraConfig) -> None:
    """Put untrained adapters into ``network``; their parameters are on the meta device."""
    inject_adapter_in_model(config, network, low_cpu_mem_usage=True)


def first_adapter_value(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """How an adapter begins, by the name of its parameter: A as a linear layer, B as zeros.

    The value does not depend on how many processes there are.
    """
    if ".lora_B." in name:
        return torch.zeros(tuple(shape))
    generator = torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode()))
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return torch.empty(tuple(shape)).uniform_(-bound, bound, generator=generator)


def stored_name(name: str) -> str:
    """The name in an adapter directory of the adapter parameter ``name``."""
    return PREFIX + name.replace(f"{ADAPTER}.", ".")


def load_adapters(network: TrainingNetwork, directory: Path) -> None:
    """Put the adapters of a directory into a loaded ``network``.

    Raises:
        CheckpointError: a file is missing, or its tensors do not fit the network.
    """
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory / name}: file missing; not an adapter directory")
    add_adapters(network, LoraConfig.from_pretrained(directory))
    tensors = load_file(directory / WEIGHTS_NAME)
    expected = {
        stored_name(name): (name, parameter)
        for name, parameter in network.named_parameters()
        if ".lora_" in name
    }
    for name in expected.keys() ^ tensors.keys():
        where = "has no place in the model" if name in tensors else "is missing"
        raise CheckpointError(f"{directory / WEIGHTS_NAME}: tensor {name} {where}")
    for stored, (name, parameter) in expected.items():
        if tensors[stored].shape != parameter.shape:
            raise CheckpointError(
                f"{directory / WEIGHTS_NAME}: tensor {stored} has shape "
                f"{list(tensors[stored].shape)}, expected {list(parameter.shape)}"
            )
        owner, _, leaf = name.rpartition(".")
        layer = network.get_submodule(owner.partition(".lora_")[0])
        value = tensors[stored].to(layer.weight.device)
        value = torch.nn.Parameter(value, requires_grad=False)
        setattr(network.get_submodule(owner), leaf, value)


def merge_adapters(network: TrainingNetwork) -> None:
    """Add all adapters to the weights that they adapt, and remove them."""
    for name, layer in list(network.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge(safe_merge=True)
            owner, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(owner), leaf, layer.get_base_layer())


def apply_adapter(directory: Path, language_model: LanguageModel, whisper: torch.nn.Module) -> None:
    """Merge the adapter of ``directory`` into loaded, full-headed stages, in place."""
    network = TrainingNetwork(language_model, whisper, language_model.dtype)
    load_adapters(network, directory)
    merge_adapters(network)
