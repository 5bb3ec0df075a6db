"""Low-rank adapters (LoRA): the result of fine-tuning without a whole model.

An adapter directory is peft's: ``adapter_config.json`` and ``adapter_model.safetensors``. Its
tensors are named after the layers of the language model and the Whisper encoder; joined matrices
(queries, keys and values; gate and up) have one adapter each. It is added to the weights while
they are read, so that serving is as fast as without.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from kimia_infer.utils.errors import CheckpointError
from kimia_infer.weights.component import Component, Slot, read_json

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What peft puts before the names of an adapter's tensors."""

BLOCK_ROWS = 1024
"""Rows of a weight that are changed at once, in float32."""

_UNSUPPORTED = (
    "use_dora", "use_rslora", "use_qalora", "fan_in_fan_out", "lora_bias", "rank_pattern",
    "alpha_pattern", "modules_to_save", "layers_to_transform", "layer_replication",
    "trainable_token_indices", "target_parameters", "alora_invocation_tokens",
)  # fmt: skip
"""Fields of peft's configuration whose adapters are not supported."""


class Factors(NamedTuple):
    """The matrices of one layer, float32: ``a`` [rank, inputs] and ``b`` [outputs, rank]."""

    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class Adapter:
    """An adapter; ``factors`` are keyed by the names of the layers that they change.

    ``scale`` * b @ a is added to the weight of a layer. ``targets`` is the pattern of all layers
    it was trained for, ``base`` the checkpoint.
    """

    directory: Path
    base: str | None
    scale: float
    targets: str
    factors: dict[str, Factors]

    @classmethod
    def read(cls, directory: Path) -> Adapter:
        """Read an adapter and check everything except whether it fits a model.

        Raises:
            CheckpointError: not an adapter directory, not this kind of adapter, damaged, or with
                values that are not finite.
        """
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (directory / name).is_file():
                raise CheckpointError(f"{directory / name}: file missing; not an adapter directory")
        path = directory / CONFIG_NAME
        config = read_json(path)
        rank, alpha, targets = (config.get(key) for key in ("r", "lora_alpha", "target_modules"))
        if config.get("peft_type") != "LORA" or not isinstance(targets, str):
            raise CheckpointError(f"{path}: not an adapter that scripts/finetune made")
        for name in _UNSUPPORTED:
            if config.get(name):
                raise CheckpointError(f"{path}: {name} is not supported")
        try:
            re.compile(targets)
        except re.error as error:
            raise CheckpointError(f"{path}: target_modules is no pattern ({error})") from error
        if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float):
            raise CheckpointError(f"{path}: r and lora_alpha must be numbers")
        factors = _read_factors(directory / WEIGHTS_NAME, rank)
        return cls(directory, config.get("base_model_name_or_path"), alpha / rank, targets, factors)

    def check(self, layers: Mapping[str, nn.Linear]) -> None:
        """Raise CheckpointError unless this adapter fits the linear layers of a model."""
        path = self.directory / WEIGHTS_NAME
        wanted = {name for name in layers if re.fullmatch(self.targets, name)}
        for name in sorted(self.factors.keys() ^ wanted):
            found = "has no place in this model" if name in self.factors else "is missing"
            raise CheckpointError(f"{path}: the adapter of {name} {found}; {self._origin}")
        for name, factors in self.factors.items():
            shape = (len(factors.b), factors.a.shape[1])
            if shape != layers[name].weight.shape:
                raise CheckpointError(
                    f"{path}: the adapter of {name} is for a weight of shape {list(shape)}, the "
                    f"model has {list(layers[name].weight.shape)}; {self._origin}"
                )

    @property
    def _origin(self) -> str:
        return f"it was trained on {self.base or 'another model'}"

    def adapted(self, components: Mapping[str, Component]) -> dict[str, Component]:
        """The ``language_model`` and ``whisper`` components with this adapter in their weights.

        A stored weight is changed in float32 and rounded to the dtype that it is stored in, so
        that a checkpoint that was written with the adapter gives exactly the same model.

        Raises:
            CheckpointError: the adapter does not fit.
        """
        with torch.device("meta"):
            modules = {name: component.build() for name, component in components.items()}
        self.check(linear_layers(modules))
        return {
            name: replace(component, slots=[self._slot(name, slot) for slot in component.slots])
            for name, component in components.items()
        }

    def _slot(self, component: str, slot: Slot) -> Slot:
        layer = f"{component}.{slot.parameter.removesuffix('.weight')}"
        if layer not in self.factors or not slot.parameter.endswith(".weight"):
            return slot
        if slot.combine is not None:
            raise CheckpointError(
                f"{self.directory}: the weights of {layer} are not stored as plain values, the "
                "only ones that an adapter can be added to; use the checkpoint it was trained on"
            )
        first_row = 0 if slot.rows is None else slot.rows[0]
        return replace(slot, combine=partial(self._changed, layer, first_row))

    @torch.no_grad()
    def _changed(self, layer: str, first_row: int, weight: Tensor) -> Tensor:
        """``weight``, the rows of ``layer`` from ``first_row`` on, changed in place."""
        a, b = self.factors[layer]
        for start in range(0, len(weight), BLOCK_ROWS):
            rows = weight[start : start + BLOCK_ROWS]
            change = b[first_row + start : first_row + start + len(rows)] @ a
            rows.copy_(rows.float() + self.scale * change)
        return weight


def linear_layers(modules: Mapping[str, nn.Module]) -> dict[str, nn.Linear]:
    """All linear layers by their names in adapters."""
    return {
        f"{component}.{name}": layer
        for component, module in modules.items()
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    }


def _read_factors(path: Path, rank: int) -> dict[str, Factors]:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from error
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", name)
        if match is None or tensor.ndim != 2:
            raise CheckpointError(f"{path}: {name} is not a matrix of an adapter")
        if not tensor.isfinite().all():
            raise CheckpointError(f"{path}: {name} holds values that are not finite")
        pairs.setdefault(match[1], {})[match[2]] = tensor.float()
    if not pairs:
        raise CheckpointError(f"{path}: no tensors")
    for layer, pair in pairs.items():
        if pair.keys() != {"A", "B"} or (len(pair["A"]), pair["B"].shape[1]) != (rank, rank):
            raise CheckpointError(f"{path}: the adapter of {layer} is not of rank {rank}")
    return {layer: Factors(pair["A"], pair["B"]) for layer, pair in pairs.items()}
