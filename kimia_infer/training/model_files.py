"""The network that a run trains, read from a checkpoint and written as one that is served."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from torch import Tensor, nn

from kimia_infer.models.kimi_audio.checkpoint import TUNED_WHISPER, WHISPER_FOLDER
from kimia_infer.training.adapters import ADAPTER, BASE, first_adapter_value
from kimia_infer.training.checkpoints import LiveTensor, live, take_over, write_tensors
from kimia_infer.training.network import TRAINABLE, TrainingNetwork, recompute_activations
from kimia_infer.training.parallel import assign, shard, whole
from kimia_infer.weights.adapter import PREFIX, WEIGHTS_NAME
from kimia_infer.weights.component import Component
from kimia_infer.weights.tensors import Reader, Report

if TYPE_CHECKING:
    from peft import LoraConfig

    from kimia_infer.training.quantized import QuantizedLinear


WHISPER_PREFIX = "model.encoder."

Components = dict[str, Component]
"""What training starts from, by the names in the network; see :func:`understanding_components`."""


def build_network(
    components: Components,
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
        dtype: of activations and frozen weights; trained weights are float32.
        parts: what is trained, names of ``TRAINABLE``; with ``adapters`` only these.
        recompute: whether activations are computed again in the backward pass.
        seed: of new adapters.
        quantized: whether the matrices of the decoder are in 4 bits; for one process.
    """
    with torch.device("meta"):
        children = {name: component.build() for name, component in components.items()}
        network = TrainingNetwork(**children, dtype=dtype)
    unfilled = plan_training(network, parts, adapters, recompute, quantized)
    if state.num_processes > 1:
        shard(network, state)
    network.to_empty(device=state.device)
    assert state.device is not None
    _fill(network, components, unfilled, state.device, report)
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

    Returns the layers that wait for weights in 4 bits, by the names of these.
    """
    network.requires_grad_(False)
    unfilled = {}
    if quantized:
        from kimia_infer.training.quantized import quantize_layers  # only here needs bitsandbytes

        unfilled = quantize_layers(network)
    if adapters is not None:
        from peft import inject_adapter_in_model  # takes seconds

        inject_adapter_in_model(adapters, network, low_cpu_mem_usage=True)
    trained = tuple(prefix for part in parts for prefix in TRAINABLE[part])
    for name, parameter in list(network.named_parameters()):
        if name.replace(f"{BASE}.", ".") in unfilled:
            continue
        wanted = ".lora_" in name if adapters is not None else name.startswith(trained)
        kept = parameter.detach().to(torch.float32 if wanted else network.dtype)
        owner, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(owner), leaf, nn.Parameter(kept, requires_grad=wanted))
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


def _fill(
    network: TrainingNetwork,
    components: Components,
    unfilled: dict[str, QuantizedLinear],
    device: torch.device,
    report: Report | None,
) -> None:
    """Read one parameter after the other, so that no process holds more than one whole.

    The weights of the layers ``unfilled`` are quantized.
    """
    reader = Reader()
    for child, component in components.items():
        parameters, by_name = base_parameters(network, child), attrgetter("parameter")
        for name, slots in groupby(sorted(component.slots, key=by_name), by_name):
            layer = unfilled.get(f"{child}.{name}")
            if layer is None:
                value = torch.empty(parameters[name].shape, dtype=parameters[name].dtype)
            else:
                value = torch.empty(layer.out_features, layer.in_features, dtype=network.dtype)
            for slot in slots:
                component.fill(slot, value, reader, report)
            if layer is None:
                assign(parameters[name], value)
            else:
                layer.fill(value, device)


def write_adapter(
    folder: Path, network: TrainingNetwork, config: LoraConfig, state: PartialState
) -> None:
    """Write the adapters of ``network`` as peft does. All processes have to call this."""
    tensors = [
        live(PREFIX + name.replace(f"{ADAPTER}.", "."), parameter)
        for name, parameter in network.named_parameters()
        if ".lora_" in name
    ]
    write_tensors(folder / WEIGHTS_NAME, tensors, state.is_main_process)
    if state.is_main_process:
        config.save_pretrained(str(folder))


def write_model(
    folder: Path,
    network: TrainingNetwork,
    source: Path,
    components: Components,
    with_whisper: bool,
    state: PartialState,
) -> None:
    """Write a checkpoint that can be served, in the published names and the stored dtypes.

    What was not trained is taken over from the directory ``source``, weights as hard links where
    the file system allows. A Whisper encoder that is trained, or was before, is stored with the
    language model, as in published fine-tuned checkpoints, and in its folder too. All processes
    have to call this.
    """
    writes, rewritten = state.is_main_process, ["."]
    language_model, whisper = components["language_model"], components["whisper"]
    tensors = list(_published(network, language_model))
    if with_whisper or any(n.startswith(TUNED_WHISPER) for n in language_model.store.tensors):
        stored = whisper.store.tensors
        for target, prefix in ((tensors, TUNED_WHISPER), (own := [], WHISPER_PREFIX)):
            for name, parameter in base_parameters(network, "whisper").items():
                target.append(live(prefix + name, parameter, stored[name].dtype))
        write_tensors(folder / WHISPER_FOLDER / "model.safetensors", own, writes)
        rewritten.append(WHISPER_FOLDER)
    write_tensors(folder / "model.safetensors", tensors, writes)
    if writes:
        take_over(source, folder, rewritten)


def _published(network: TrainingNetwork, component: Component) -> Iterator[LiveTensor]:
    """The language model by published names; joined matrices are cut into their rows."""
    parameters = base_parameters(network, "language_model")
    gathered = lru_cache(maxsize=1)(whole)  # once for all tensors that are cut from a parameter
    stored = component.store.tensors
    for slot in sorted(component.slots, key=lambda slot: slot.parameter):
        ((name, shape),) = slot.sources.items()
        rows = slice(None) if slot.rows is None else slice(*slot.rows)

        def value(
            parameter: nn.Parameter = parameters[slot.parameter], rows: slice = rows
        ) -> Tensor:
            return gathered(parameter)[rows]

        yield LiveTensor(name, shape, stored[name].readable_dtype, value)
