"""The network that a run trains: built without memory, chosen parts, divided, then loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from peft import LoraConfig
from torch import Tensor, nn

from kimia_infer.language_model.model import language_model_part
from kimia_infer.tokenizer.whisper import whisper_part
from kimia_infer.training.adapters import ADAPTER, BASE, add_adapters, first_adapter_value
from kimia_infer.training.network import PARTS, TrainingNetwork, recompute_activations
from kimia_infer.training.parallel import assign, shard
from kimia_infer.weights.checkpoint import Part
from kimia_infer.weights.tensors import Reader

WHISPER_FOLDER = "whisper-large-v3"


@dataclass(frozen=True)
class Source:
    """The checkpoint that training starts from, checked; ``directory`` is complete."""

    directory: Path
    language_model: Part
    whisper: Part

    @classmethod
    def open(cls, directory: Path) -> Source:
        """Raises CheckpointError for the first thing that does not fit."""
        whisper = whisper_part(directory / WHISPER_FOLDER)
        return cls(directory, language_model_part(directory), whisper)

    @property
    def children(self) -> dict[str, Part]:
        """The parts by their names in the network."""
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
    """
    with torch.device("meta"):
        network = TrainingNetwork(source.language_model.build(), source.whisper.build(), dtype)
    network.requires_grad_(False)
    if adapters is not None:
        add_adapters(network, adapters)
    trained = tuple(prefix for part in parts for prefix in PARTS[part])
    for name, parameter in list(network.named_parameters()):
        wanted = ".lora_" in name if adapters is not None else name.startswith(trained)
        _replace(network, name, parameter.to(torch.float32 if wanted else dtype), wanted)
    if recompute:
        recompute_activations(network)
    if state.num_processes > 1:
        shard(network, state)
    network.to_empty(device=state.device)
    _fill(network, source, report)
    for name, parameter in network.named_parameters():
        if ".lora_" in name:
            assign(parameter, first_adapter_value(name, parameter.shape, seed))
    return network


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


def _fill(network: TrainingNetwork, source: Source, report: Callable[[int], None] | None) -> None:
    """Read one parameter after the other, so that no process holds more than one whole."""
    reader = Reader()
    for child, part in source.children.items():
        parameters = base_parameters(network, child)
        slots: dict[str, list] = {}
        for slot in part.slots:
            slots.setdefault(slot.parameter, []).append(slot)
        for name, parameter in parameters.items():
            value = torch.empty(parameter.shape, dtype=parameter.dtype)
            for slot in slots[name]:
                part.fill(slot, value, reader, report)
            assign(parameter, value)
