"""Write the slim checkpoint: the published layout without what serving never reads.

Left out are optimizer state, the Whisper decoder, stored rotary frequencies and layers that the
speech tokenizer does not use; pickles become safetensors. With dtype "served" every component is
stored as it is served: in bfloat16, rounded exactly as loading the source in bfloat16 rounds, with
weight norm folded in float32 first; the speech tokenizer in float32. With dtype "source" every
tensor keeps its bytes, weight norm unfolded, so that the copy gives the same results as the source
in any dtype. In both, the matrices of the language model's layers can be quantized.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from kimia_infer.layers.quantization import (
    check_quantization,
    description,
    quantized_component,
    stored_name,
)
from kimia_infer.models.kimi_audio.checkpoint import MODEL
from kimia_infer.models.kimi_audio.components import (
    StoredComponent,
    StoredComponents,
    checkpoint_components,
)
from kimia_infer.models.kimi_audio.packing import packed_component, packed_files, packed_part
from kimia_infer.utils.errors import WeightsError
from kimia_infer.weights.header import INDEX_NAME
from kimia_infer.weights.layout import WEIGHT_SUFFIXES, read_record
from kimia_infer.weights.manifest import MANIFEST_NAME, CheckpointManifest, read_checkpoint_manifest
from kimia_infer.weights.tensors import Reader
from kimia_infer.weights.writing import (
    NewFile,
    NewTensor,
    SmallFile,
    TensorFile,
    require_usable,
    tensor_files,
    write_checkpoint,
)

DTYPES = ("served", "source")
SHARD_BYTES = 4 * 10**9  # at most, of the language model; a larger tensor has its own shard


def prepare_weights(
    source: Path,
    target: Path,
    dtype: str = "served",
    shard_bytes: int = SHARD_BYTES,
    quantization: str = "none",
    packed: bool = False,
    detokenizer: bool = True,
) -> CheckpointManifest:
    """Write the slim checkpoint of ``source`` to ``target``; see :func:`write_checkpoint`.

    Host memory stays at one block, or one tensor where weight norm is folded or a matrix
    quantized.

    Args:
        source: a complete checkpoint that is not quantized; it is only read.
        target: a new directory, or one that an earlier call has begun or finished.
        dtype: "served" or "source".
        shard_bytes: largest size of a file of the language model.
        quantization: one of ``SCHEMES``.
        packed: for a CPU alone, which maps the matrices; see
            :mod:`kimia_infer.models.kimi_audio.packing`. Memory then holds four layers.
        detokenizer: also what only speech output needs, which ``source`` may then lack.

    Raises:
        CheckpointError: ``source`` is no complete checkpoint, damaged, or quantized itself.
        ConfigurationError: ``quantization`` does not fit the model.
        WeightsError: ``target`` cannot be used, or has too little space.
    """
    if dtype not in DTYPES:
        raise WeightsError(f"dtype: expected {' or '.join(DTYPES)}, found {dtype!r}")
    require_usable(source, target)
    origin = read_checkpoint_manifest(source / MANIFEST_NAME)
    if origin is not None:
        origin.check(source)
    components = checkpoint_components(source, detokenizer)
    check_quantization(quantization, torch.device("cpu"))
    change = packed_component if packed else quantized_component
    components = components.changed(
        language_model=change(components.language_model.component, quantization)
    )
    if packed:
        components = with_packed_parts(components)
    planned = CheckpointManifest(
        dtype,
        shard_bytes,
        sources=origin.sources if origin else read_record(source).get("sources", {}),
        source_files=_state(source, components),
        files={},
        quantization=description(quantization),
        packed=packed,
    )
    files: dict[str, NewFile] = {
        name: SmallFile((source / name).read_bytes()) for name in _small_files(source)
    }
    files |= plan_files(components, dtype, shard_bytes, packed)
    reader = Reader(partial(origin.checksum, source) if origin else None)

    def check_source() -> None:
        if _state(source, components) != planned.source_files:
            raise WeightsError(
                f"{source}: changed while it was read; delete {target} and run this again"
            )

    return write_checkpoint(target, planned, files, reader, check_source)


def _small_files(source: Path) -> list[str]:
    """The files of the layout besides weights: configurations and the text tokenizer."""
    generated = (MANIFEST_NAME, INDEX_NAME)
    names = [name for name in MODEL.files if not name.endswith(WEIGHT_SUFFIXES)]
    return [name for name in names if name not in generated and (source / name).is_file()]


def _state(source: Path, components: StoredComponents) -> dict[str, dict[str, int]]:
    """Size and modification time of every file that is read."""
    stores = [entry.component.store for _, entry in components.items()]
    paths = {stored.file for store in stores for stored in store.tensors.values()}
    paths |= {source / name for name in (*_small_files(source), INDEX_NAME)}
    paths = {path for path in paths if path.is_file()}  # one file needs no index
    facts = {path.relative_to(source).as_posix(): path.stat() for path in sorted(paths)}
    return {name: {"size": s.st_size, "modified_ns": s.st_mtime_ns} for name, s in facts.items()}


def with_packed_parts(components: StoredComponents) -> StoredComponents:
    """``components`` with the layers of encoders and DiT in 8 bits."""
    parts = {name: part for name, part in components.items() if name != "language_model"}
    return components.changed(**{n: packed_part(part.component) for n, part in parts.items()})


def plan_files(
    components: StoredComponents, dtype: str, shard_bytes: int, packed: bool = False
) -> dict[str, NewFile]:
    """Every file of the slim checkpoint's weights by its name."""
    files: dict[str, NewFile] = {}
    for name, entry in components.items():
        if packed:
            files |= packed_files(name, entry.component)
            rest = [slot for slot in entry.component.slots if slot.quantize is None]
            rest_of = replace(entry.component, slots=rest, ignored=None)
            entry = replace(entry, component=rest_of)
        tensors = _component_tensors(entry, served=dtype == "served")
        if entry.folder:
            files[f"{entry.folder}/model.safetensors"] = TensorFile(tensors)
        else:
            files |= tensor_files(tensors, shard_bytes)
    return files


def _component_tensors(entry: StoredComponent, served: bool) -> list[NewTensor]:
    """The tensors of a component in a slim checkpoint, by published names.

    With ``served``, combined tensors have the names of their parameters, and the dtype is that of
    a model served in bfloat16. Otherwise they are the stored tensors. Quantized matrices are the
    same in both cases.
    """
    store = entry.component.store
    tensors = []
    for slot in entry.component.slots:
        sources, dtype = tuple(slot.sources), entry.served(torch.bfloat16)
        whole = [torch.empty(shape, device="meta") for shape in slot.sources.values()]
        # Name, sources, how they become the value, and an empty one of its shape and dtype.
        made: list[tuple[str, tuple[str, ...], Callable[..., Tensor] | None, Tensor]]
        if slot.quantize is not None:
            made = [
                (
                    stored_name(sources[0], leaf),
                    sources,
                    _leaf(slot.quantize, leaf),
                    value,
                )
                for leaf, value in slot.quantize(*whole).items()
            ]
        elif served and slot.combine is not None:
            value = slot.combine(*whole)
            made = [(slot.parameter, sources, slot.combine, value.to(dtype))]
        else:
            kept = [dtype if served else store.tensors[name].readable_dtype for name in sources]
            made = [
                (name, (name,), None, value.to(kind))
                for name, value, kind in zip(sources, whole, kept, strict=True)
            ]
        tensors += [
            NewTensor(entry.prefix + name, tuple(value.shape), value.dtype, store, names, combine)
            for name, names, combine, value in made
        ]
    return tensors


def _leaf(quantize: Callable[[Tensor], dict[str, Tensor]], leaf: str) -> Callable[[Tensor], Tensor]:
    return lambda value: quantize(value)[leaf]
