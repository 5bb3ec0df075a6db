"""A checkpoint for a CPU: the language model's matrices in files that a processor maps as they are.

Heads have the rows of their own track alone, in 8 bits; the embedding is bfloat16 and read by row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from kimia_infer.layers.packed import (
    PACKED,
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
    PACKED_LAYERS,
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

Layers = dict[str, QuantizedLinear]


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


def packed_build(build: Callable[[], LanguageModel]) -> Callable[[], LanguageModel]:
    """Like ``build`` of a quantized model, but for matrices that :func:`open_packed` maps."""

    def built() -> LanguageModel:
        model = _with_cut_heads(build)()
        for name, layers in packed_groups(model).items():
            model.packed_files[name] = replace_layers(model, layers)
        return model

    return built


def packed_groups(model: LanguageModel) -> dict[str, Layers]:
    """The layers of a quantized model by the names of their files."""
    groups: dict[str, Layers] = {}
    for name, layer in packable(model).items():
        part, _, rest = name.partition(".")
        if part not in HEADS:
            first = int(rest.partition(".")[0]) // PACKED_LAYERS * PACKED_LAYERS
            part = f"{part}-{first}"
        groups.setdefault("heads" if part in HEADS else part, {})[name] = layer
    return groups


def served_language_model(directory: Path) -> Component[LanguageModel]:
    """The language model of a checkpoint directory, quantized, packed or neither.

    :func:`open_packed` completes what this loads. Raises CheckpointError.
    """
    manifest = read_checkpoint_manifest(directory / MANIFEST_NAME)
    if manifest is None or not manifest.packed:
        return language_model_component(directory, quantized=True)
    config = LanguageModelConfig.from_directory(directory)
    build = packed_build(stored_build(lambda: LanguageModel(config), stored_scheme(directory)))
    with torch.device("meta"):
        unpacked = {name for name, _ in build().named_parameters()}
    return Component(
        name="language model",
        build=build,
        slots=[slot for slot in language_model_slots(config) if slot.parameter in unpacked],
        store=open_directory(directory),
        ignored=(),
    )


def open_packed(model: LanguageModel, directory: Path) -> None:
    """Map the packed matrices of ``model`` from a checkpoint directory.

    Raises:
        CheckpointError: a file is damaged.
    """
    folder = (directory / PACKED_FOLDER).resolve()
    files = model.packed_files
    with progress("Mapping matrices", len(files), "files") as bar:
        for name, matrices in files.items():
            matrices.map(folder / name)
            bar.update()


def packed_files(component: Component[LanguageModel]) -> dict[str, PackedFile]:
    """The files of a :func:`packed_component`, by their names in the checkpoint."""
    with torch.device("meta"):
        groups = packed_groups(component.build())
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
    component: Component[LanguageModel]
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
