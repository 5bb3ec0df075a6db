"""The network that a run trains, read from a checkpoint and written as one that is served."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from torch import Tensor, nn

from kimia_infer.models.kimi_audio.checkpoint import TUNED_WHISPER, WHISPER_FOLDER
from kimia_infer.models.kimi_audio.components import understanding_components
from kimia_infer.training.adapters import (
    ADAPTER,
    BASE,
    add_adapters,
    first_adapter_value,
    stored_name,
)
from kimia_infer.training.checkpoints import LiveTensor, live, take_over, write_tensors
from kimia_infer.training.network import TRAINABLE, TrainingNetwork, recompute_activations
from kimia_infer.training.parallel import assign, shard, whole
from kimia_infer.weights.adapter import WEIGHTS_NAME
from kimia_infer.weights.component import Component
from kimia_infer.weights.tensors import Reader, Report

if TYPE_CHECKING:
    from peft import LoraConfig

    from kimia_infer.training.quantized import QuantizedLinear


WHISPER_PREFIX = "model.encoder."


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
    report: Report | None = None,
    quantized: bool = False,
) -> TrainingNetwork:
    """The network on the device of this process, divided if there are several.

    Args:
        source: what the weights are read from.
        state: the processes.
        dtype: of activations and frozen weights; trained weights are float32.
        parts: what is trained, names of ``TRAINABLE``; with ``adapters`` only these.
        adapters: as :func:`lora_config` makes them.
        recompute: whether activations are computed again in the backward pass.
        seed: of new adapters.
        report: gets the number of values read each time.
        quantized: whether the matrices of the decoder are unfilled in 4 bits, by one process.
    """
    with torch.device("meta"):
        network = TrainingNetwork(source.language_model.build(), source.whisper.build(), dtype)
    unfilled = plan_training(network, parts, adapters, recompute, quantized)
    if state.num_processes > 1:
        shard(network, state)
    network.to_empty(device=state.device)
    assert state.device is not None
    _fill(network, source, unfilled, state.device, report)
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
    unfilled = _quantize(network) if quantized else {}
    if adapters is not None:
        add_adapters(network, adapters)
    trained = tuple(prefix for part in parts for prefix in TRAINABLE[part])
    for name, parameter in list(network.named_parameters()):
        if name.replace(f"{BASE}.", ".") in unfilled:
            continue
        wanted = ".lora_" in name if adapters is not None else name.startswith(trained)
        kept = parameter.to(torch.float32 if wanted else network.dtype)
        _replace(network, name, kept, wanted)
    if recompute:
        recompute_activations(network)
    return unfilled


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
    unfilled: dict[str, QuantizedLinear],
    device: torch.device,
    report: Report | None,
) -> None:
    """Read one parameter after the other, so that no process holds more than one whole.

    The weights of the layers ``unfilled`` are quantized.
    """
    reader = Reader()
    for child, component in source.children.items():
        parameters = base_parameters(network, child)
        slots: dict[str, list] = {}
        for slot in component.slots:
            slots.setdefault(slot.parameter, []).append(slot)
        for name, parameter in parameters.items():
            layer = unfilled.get(f"{child}.{name}")
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


def write_adapter(
    folder: Path, network: TrainingNetwork, config: LoraConfig, state: PartialState
) -> None:
    """Write the adapters of ``network`` as peft does. All processes have to call this."""
    tensors = [
        live(stored_name(name), parameter)
        for name, parameter in network.named_parameters()
        if ".lora_" in name
    ]
    write_tensors(folder / WEIGHTS_NAME, tensors, state.is_main_process)
    if state.is_main_process:
        config.save_pretrained(str(folder))


def write_model(
    folder: Path, network: TrainingNetwork, source: Source, with_whisper: bool, state: PartialState
) -> None:
    """Write a checkpoint that can be served, in the published names and the stored dtypes.

    What was not trained is taken over from ``source``, weights as hard links where the file
    system allows. A Whisper encoder that is trained, or was before, is stored with the language
    model, as in published fine-tuned checkpoints, and in its folder too. All processes have to
    call this.
    """
    with_whisper = with_whisper or source.tuned_whisper
    tensors = list(_published(network, source))
    if with_whisper:
        tensors += _whisper(network, source, TUNED_WHISPER)
        path = folder / WHISPER_FOLDER / "model.safetensors"
        write_tensors(path, _whisper(network, source, WHISPER_PREFIX), state.is_main_process)
    write_tensors(folder / "model.safetensors", tensors, state.is_main_process)
    if state.is_main_process:
        take_over(source.directory, folder, [".", *([WHISPER_FOLDER] if with_whisper else [])])


def _published(network: TrainingNetwork, source: Source) -> Iterator[LiveTensor]:
    """The language model by published names; joined matrices are cut into their rows."""
    parameters = base_parameters(network, "language_model")
    gathered = _LastGathered()
    stored = source.language_model.store.tensors
    for slot in sorted(source.language_model.slots, key=lambda slot: slot.parameter):
        ((name, shape),) = slot.sources.items()
        rows = slice(None) if slot.rows is None else slice(*slot.rows)

        def value(
            parameter: nn.Parameter = parameters[slot.parameter], rows: slice = rows
        ) -> Tensor:
            return gathered(parameter)[rows]

        yield LiveTensor(name, shape, stored[name].readable_dtype, value)


def _whisper(network: TrainingNetwork, source: Source, prefix: str) -> Iterator[LiveTensor]:
    stored = source.whisper.store.tensors
    for name, parameter in base_parameters(network, "whisper").items():
        yield live(prefix + name, parameter, stored[name].dtype)


class _LastGathered:
    """Gathers a divided parameter once for all tensors that are cut from it."""

    def __init__(self) -> None:
        self._parameter: nn.Parameter | None = None
        self._value = torch.empty(0)

    def __call__(self, parameter: nn.Parameter) -> Tensor:
        if parameter is not self._parameter:
            self._parameter, self._value = parameter, whole(parameter)
        return self._value
