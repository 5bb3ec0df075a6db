"""A checkpoint for a CPU: matrices in files that a processor maps as it reads them.

Those of the language model are quantized as asked for; its heads, which have the rows of their own
track alone, and the layers of encoders and DiT are in 8 bits. The embedding is bfloat16 and read by
row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from kimia_infer.layers.packed import (
    PACKED,
    PACKED_LAYERS,
    PackedLinear,
    can_pack,
    file_bytes,
    missing,
    packable,
    quantized_linear,
    replace_layers,
    write_packed,
)
from kimia_infer.layers.quantization import (
    STORAGES,
    QuantizedLinear,
    quantize,
    quantized_component,
    stored_build,
    stored_scheme,
)
from kimia_infer.models.kimi_audio.config import LanguageModelConfig
from kimia_infer.models.kimi_audio.language_model import (
    LanguageModel,
    language_model_component,
    language_model_slots,
)
from kimia_infer.utils.errors import ConfigurationError
from kimia_infer.utils.progress import progress
from kimia_infer.weights.component import Component, Slot
from kimia_infer.weights.manifest import (
    MANIFEST_NAME,
    PACKED_FOLDER,
    FileEntry,
    read_checkpoint_manifest,
    sha256_of,
)
from kimia_infer.weights.tensors import Reader, Report, open_directory

HEADS = ("text_head", "audio_head")
LAYERS = ("layers.", "blocks.")
"""What the names of layers begin with in encoders and DiT."""

Layers = dict[str, QuantizedLinear]
Network = TypeVar("Network", bound=nn.Module)


def packed_component(component: Component[LanguageModel], scheme: str) -> Component[LanguageModel]:
    """``component``, of an unquantized checkpoint, with all that is packed for a CPU quantized.

    Raises:
        ConfigurationError: ``scheme`` is none that can be packed, a package is missing, or rows
            are not whole groups.
    """
    if scheme not in PACKED:
        raise ConfigurationError(
            f"quantization: a checkpoint for a CPU is {' or '.join(PACKED)}, found {scheme!r}"
        )
    if (lacking := missing()) is not None:
        raise ConfigurationError(f"{lacking} is not installed; install the extra 'cpu'")
    quantized = quantized_component(component, scheme)
    build = _with_cut_heads(quantized.build)
    with torch.device("meta"):
        model = build()
    layers = packable(model)
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear) and name not in layers:
            raise ConfigurationError(
                f"quantization: {name} has rows of {layer.in_features}, which a CPU reads in "
                "groups of 32; use quantization when it is loaded"
            )
    rows = {
        "text_head.weight": slice(None, model.config.token_offset),
        "audio_head.weight": slice(model.config.base_tokens, None),
    }

    def slot_of(slot: Slot) -> Slot:
        if slot.parameter not in rows:
            return slot
        cut = partial(_rows, rows=rows[slot.parameter])
        return replace(slot, combine=cut, quantize=partial(quantize, storage=STORAGES["int8"]))

    return replace(quantized, build=build, slots=[slot_of(slot) for slot in quantized.slots])


def packed_part(component: Component[Network]) -> Component[Network]:
    """An encoder or the DiT with its layers in 8 bits when they are written."""
    build = _in_8_bits(component.build)
    with torch.device("meta"):
        layers = packable(build())

    def slot_of(slot: Slot) -> Slot:
        if slot.parameter.removesuffix(".weight") not in layers:
            return slot
        return replace(slot, quantize=partial(quantize, storage=STORAGES["int8"]))

    return replace(component, build=build, slots=[slot_of(slot) for slot in component.slots])


def mapped_part(
    name: str, build: Callable[[], Network], slots: list[Slot]
) -> tuple[Callable[[], Network], list[Slot]]:
    """``build`` for a :func:`packed_part` of that name, and the slots of what is not packed."""
    build = mapped_build(name, _in_8_bits(build))
    with torch.device("meta"):
        unpacked = {parameter for parameter, _ in build().named_parameters()}
    return build, [slot for slot in slots if slot.parameter in unpacked]


def mapped_build(name: str, build: Callable[[], Network]) -> Callable[[], Network]:
    """Like ``build`` of a quantized network, but for matrices that :func:`open_packed` maps."""

    def built() -> Network:
        network = build()
        for file, layers in packed_groups(name, network).items():
            replace_layers(network, layers, file)
        return network

    return built


def packed_groups(part: str, network: nn.Module) -> dict[str, Layers]:
    """The quantized layers of a ``part`` of the model by the names of their files."""
    groups: dict[str, Layers] = {}
    for name, layer in packable(network).items():
        kind, _, rest = name.partition(".")
        if kind in HEADS:
            file = f"{part}.heads"
        else:
            file = f"{part}.{kind}.{int(rest.partition('.')[0]) // PACKED_LAYERS * PACKED_LAYERS}"
        groups.setdefault(file, {})[name] = layer
    return groups


def is_packed(directory: Path) -> bool:
    """Whether the checkpoint in ``directory`` is packed for a CPU."""
    manifest = read_checkpoint_manifest(directory / MANIFEST_NAME)
    return manifest is not None and manifest.packed


def served_language_model(directory: Path) -> Component[LanguageModel]:
    """The language model of a checkpoint directory, quantized, packed or neither.

    :func:`open_packed` completes what this loads. Raises CheckpointError.
    """
    if not is_packed(directory):
        return language_model_component(directory, quantized=True)
    config = LanguageModelConfig.from_directory(directory)
    build = mapped_language_model(config, stored_scheme(directory))
    with torch.device("meta"):
        unpacked = {name for name, _ in build().named_parameters()}
    return Component(
        name="language model",
        build=build,
        slots=[slot for slot in language_model_slots(config) if slot.parameter in unpacked],
        store=open_directory(directory),
        ignored=(),
    )


def mapped_language_model(config: LanguageModelConfig, scheme: str) -> Callable[[], LanguageModel]:
    """What builds the language model of a packed checkpoint."""
    quantized = stored_build(lambda: LanguageModel(config), scheme)
    return mapped_build("language_model", _with_cut_heads(quantized))


def open_packed(networks: Iterable[nn.Module], directory: Path) -> None:
    """Map the packed matrices of ``networks`` from a checkpoint directory.

    Raises:
        CheckpointError: a file is damaged.
    """
    folder = (directory / PACKED_FOLDER).resolve()
    files = {
        layer.matrices.file: layer.matrices
        for network in networks
        for layer in network.modules()
        if isinstance(layer, PackedLinear)
    }
    with progress("Mapping matrices", len(files), "files") as bar:
        for name, matrices in files.items():
            matrices.map(folder / name)
            bar.update()


def packed_files(part: str, component: Component) -> dict[str, PackedFile]:
    """The files of a part of a packed model, by their names in the checkpoint."""
    with torch.device("meta"):
        groups = packed_groups(part, component.build())
    return {
        f"{PACKED_FOLDER}/{name}": PackedFile(
            name, component, list(layers), file_bytes(layers.values())
        )
        for name, layers in groups.items()
    }


@dataclass(frozen=True)
class PackedFile:
    """A file of packed matrices to be written, of about ``size`` bytes."""

    name: str
    component: Component
    layers: list[str]
    size: int

    def write(self, path: Path, reader: Reader, report: Report) -> FileEntry:
        with torch.device("meta"):
            model = self.component.build()
        layers = {name: layer for name, layer in packable(model).items() if name in self.layers}
        parameters: dict[str, nn.Parameter] = {}
        for name, layer in layers.items():
            layer.bias = None  # is stored with what is not packed
            layer.to_empty(device="cpu")
            parameters |= {f"{name}.{leaf}": p for leaf, p in layer.named_parameters()}
        for slot in self.component.slots:
            if slot.parameter in parameters:
                self.component.place(slot, parameters, reader)
        write_packed(path, self.name, layers)
        report(self.size)
        return FileEntry(path.stat().st_size, sha256_of(path))


def _in_8_bits(build: Callable[[], Network]) -> Callable[[], Network]:
    """Like ``build``, but for linear layers, which have no values."""

    def built() -> Network:
        network = build()
        for name, layer in list(network.named_modules()):
            if type(layer) is nn.Linear and name.startswith(LAYERS):
                quantized = quantized_linear(layer, values=False)
                if can_pack(quantized):
                    network.set_submodule(name, quantized)
        return network

    return built


def _with_cut_heads(build: Callable[[], LanguageModel]) -> Callable[[], LanguageModel]:
    def built() -> LanguageModel:
        model = build()
        config = model.config
        model.first_audio_id = config.base_tokens
        counts = config.token_offset, config.vocab_size - config.base_tokens
        for name, count in zip(HEADS, counts, strict=True):
            head = nn.Linear(config.hidden_size, count, bias=False)
            model.set_submodule(name, quantized_linear(head, values=False))
        model.embedding.to(torch.bfloat16)
        return model

    return built


def _rows(weight: Tensor, rows: slice) -> Tensor:
    return weight[rows]
