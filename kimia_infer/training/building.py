"""The network that a run trains: built without memory, chosen parts, divided, then loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from torch import Tensor, nn

from kimia_infer.models.kimi_audio.components import understanding_components
from kimia_infer.models.kimi_audio.layout import TUNED_WHISPER
from kimia_infer.training.adapters import ADAPTER, BASE, add_adapters, first_adapter_value
from kimia_infer.training.network import PARTS, TrainingNetwork, recompute_activations
from kimia_infer.training.parallel import assign, shard
from kimia_infer.weights.component import Component
from kimia_infer.weights.tensors import Reader

if TYPE_CHECKING:
    from peft import LoraConfig

    from kimia_infer.training.quantized import QuantizedLinear


@dataclass(frozen=True)
class Source:
    """The checkpoint that training starts from, checked; ``directory`` is complete."""

    directory: Path
    language_model: Component
    whisper: Component

    @classmethod
    def open(cls, directory: Path) -> Source:
        """Raises CheckpointError for the first thing that does not fit."""
        return cls(directory, **understanding_components(directory))

    @property
    def tuned_whisper(self) -> bool:
        """Whether the encoder is stored with the language model, as after fine-tuning."""
        return any(n.startswith(TUNED_WHISPER) for n in self.language_model.store.tensors)

    @property
    def children(self) -> dict[str, Component]:
        """The components by their names in the network."""
        return {"language_model": self.language_model, "whisper": self.whisper}


def build_network(
    source: Source,
    state: PartialState,
    dtype: torch.dtype,
    parts: Sequence[str],
    adapters: LoraConfig | None = None,
    recompute: bool = False,
    seed: int = 0,
    report: Callable[[int], None] | None = None,
    quantized: bool = False,
) -> TrainingNetwork:
    """The network on the device of this process, divided if there are several.

    Args:
        source: what the weights are read from.
        state: the processes.
        dtype: of activations and frozen weights; trained weights are float32.
        parts: what is trained, names of ``PARTS``; with ``adapters`` only those are.
        adapters: as :func:`lora_config` makes them.
        recompute: whether activations are computed again in the backward pass.
        seed: of new adapters.
        report: gets the number of values read each time.
        quantized: whether the matrices of the decoder are held in 4 bits, by one process.
    """
    with torch.device("meta"):
        network = TrainingNetwork(source.language_model.build(), source.whisper.build(), dtype)
    held = plan_training(network, parts, adapters, recompute, quantized)
    if state.num_processes > 1:
        shard(network, state)
    network.to_empty(device=state.device)
    _fill(network, source, held, state.device, report)
    for name, parameter in network.named_parameters():
        if ".lora_" in name:
            assign(parameter, first_adapter_value(name, parameter.shape, seed))
    return network


def plan_training(
    network: TrainingNetwork,
    parts: Sequence[str],
    adapters: LoraConfig | None,
    recompute: bool,
    quantized: bool,
) -> dict[str, QuantizedLinear]:
    """Decide of a network on the meta device what is trained, and in which dtypes.

    The arguments are those of :func:`build_network`. Returns the layers that wait for weights in
    4 bits, by the names of these.
    """
    network.requires_grad_(False)
    held = _quantize(network) if quantized else {}
    if adapters is not None:
        add_adapters(network, adapters)
    trained = tuple(prefix for part in parts for prefix in PARTS[part])
    for name, parameter in list(network.named_parameters()):
        if name.replace(f"{BASE}.", ".") in held:
            continue
        wanted = ".lora_" in name if adapters is not None else name.startswith(trained)
        kept = parameter.to(torch.float32 if wanted else network.dtype)
        _replace(network, name, kept, wanted)
    if recompute:
        recompute_activations(network)
    return held


def trained_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """What the optimizer changes, by name."""
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def base_parameters(network: TrainingNetwork, child: str) -> dict[str, nn.Parameter]:
    """The parameters of a child without its adapters, named as in a child without any."""
    return {
        name.replace(f"{BASE}.", "."): parameter
        for name, parameter in network.get_submodule(child).named_parameters()
        if f"{ADAPTER}." not in name
    }


def _replace(network: nn.Module, name: str, value: Tensor, trained: bool) -> None:
    owner, _, leaf = name.rpartition(".")
    parameter = nn.Parameter(value.detach(), requires_grad=trained)
    network.get_submodule(owner)._parameters[leaf] = parameter


def _quantize(network: TrainingNetwork) -> dict[str, QuantizedLinear]:
    from kimia_infer.training.quantized import quantize_layers  # only here is bitsandbytes needed

    return quantize_layers(network)


def _fill(
    network: TrainingNetwork,
    source: Source,
    held: dict[str, QuantizedLinear],
    device: torch.device,
    report: Callable[[int], None] | None,
) -> None:
    """Read one parameter after the other, so that no process holds more than one whole.

    The weights of the layers ``held`` are quantized.
    """
    reader = Reader()
    for child, component in source.children.items():
        parameters = base_parameters(network, child)
        slots: dict[str, list] = {}
        for slot in component.slots:
            slots.setdefault(slot.parameter, []).append(slot)
        for name, parameter in parameters.items():
            layer = held.get(f"{child}.{name}")
            if layer is None:
                value = torch.empty(parameter.shape, dtype=parameter.dtype)
            else:
                value = torch.empty(layer.out_features, layer.in_features, dtype=network.dtype)
            for slot in slots[name]:
                component.fill(slot, value, reader, report)
            if layer is None:
                assign(parameter, value)
            else:
                layer.fill(value, device)
