"""Write the slim checkpoint: the published layout with nothing in it that serving never reads.

Optimizer state, the Whisper decoder, stored rotary frequencies and layers that the speech
tokenizer does not use stay behind, pickles become safetensors. In the dtype "served" every
part is stored as it is served: bfloat16, rounded exactly as loading the source in bfloat16
rounds, with weight norm folded in float32 first; the speech tokenizer in float32. In the dtype
"source" every tensor keeps its bytes, weight norm unfolded, so that whatever is computed from
the source in any dtype is computed from the copy, too. In both, the matrices of the language
model's layers can be quantized.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from kimia_infer.layers.quantization import (
    check_quantization,
    description,
    quantized_component,
)
from kimia_infer.models.kimi_audio.components import StoredComponents, checkpoint_components
from kimia_infer.models.kimi_audio.layout import INDEX_NAME, UNFINISHED_NAME, read_record
from kimia_infer.models.kimi_audio.published import MODEL
from kimia_infer.models.kimi_audio.writing import (
    NewFile,
    NewTensor,
    SmallFile,
    TensorFile,
    component_tensors,
)
from kimia_infer.utils.errors import WeightsError
from kimia_infer.weights.manifest import (
    MANIFEST_NAME,
    CheckpointManifest,
    read_checkpoint_manifest,
    sha256_of,
)
from kimia_infer.weights.tensors import Reader

DTYPES = ("served", "source")
SHARD_BYTES = 4 * 10**9  # at most, of the language model; a larger tensor has its own shard


def prepare_weights(
    source: Path,
    target: Path,
    dtype: str = "served",
    shard_bytes: int = SHARD_BYTES,
    quantization: str = "none",
) -> CheckpointManifest:
    """Write the slim checkpoint of ``source`` to ``target``, or continue to.

    Only whole files get their names in ``target``, and the manifest comes last. A call that
    was interrupted is continued by the same one; in a finished ``target`` it verifies every
    file and writes those again that are damaged. Host memory stays at one block, or one tensor
    where weight norm is folded or a matrix quantized. ``quantization`` is one of ``SCHEMES``.

    Raises:
        CheckpointError: ``source`` is no complete checkpoint, damaged, or quantized itself.
        ConfigurationError: ``quantization`` does not fit the model.
        WeightsError: ``target`` cannot be used, or has too little space.
    """
    if dtype not in DTYPES:
        raise WeightsError(f"dtype: expected {' or '.join(DTYPES)}, found {dtype!r}")
    _require_usable(source, target)
    origin = read_checkpoint_manifest(source / MANIFEST_NAME)
    if origin is not None:
        origin.check(source)
    components = checkpoint_components(source)
    check_quantization(quantization, torch.device("cpu"))
    components = components.changed(
        language_model=quantized_component(components.language_model.component, quantization)
    )
    sources = origin.sources if origin else read_record(source).get("sources", {})
    state, held = _state(source, components), description(quantization)
    planned = CheckpointManifest(dtype, shard_bytes, sources, state, files={}, quantization=held)
    files = _plan(source, components, dtype, shard_bytes)
    reader = Reader(partial(origin.checksum, source) if origin else None)
    with _locked(target):
        known = _begun(target, planned)
        with _progress(files) as bar:
            todo = [name for name in files if not _is_whole(target, name, files, known, bar)]
            if todo or not (target / MANIFEST_NAME).is_file():
                _reopen(target, known)
                _require_space(target, [files[name].size for name in todo])
                for name in todo:
                    _write(target, name, files[name], known, reader, bar)
                if _state(source, components) != planned.source_files:
                    raise WeightsError(
                        f"{source}: changed while it was read; delete {target} and run this again"
                    )
                (target / UNFINISHED_NAME).replace(target / MANIFEST_NAME)
        shutil.rmtree((target / UNFINISHED_NAME).parent)
    return known


def _require_usable(source: Path, target: Path) -> None:
    """Refuse a target in which something of somebody else's could be overwritten."""
    new, old = target.resolve(), source.resolve()
    if new == old or old in new.parents:
        raise WeightsError(f"{target}: lies in the source {source}; name a directory elsewhere")
    if target.exists() and not target.is_dir():
        raise WeightsError(f"{target}: not a directory")
    begun = any((target / name).is_file() for name in (UNFINISHED_NAME, MANIFEST_NAME))
    if target.is_dir() and not begun:
        own = (target / UNFINISHED_NAME).parent  # made first, so it may be all there is
        foreign = sorted(path.name for path in target.iterdir() if path != own)
        if foreign:
            raise WeightsError(
                f"{target}: holds {foreign[0]} and no prepared checkpoint; name a new directory"
            )


def _small_files(source: Path) -> list[str]:
    """What the layout lists besides weights: configurations and the text tokenizer."""
    generated = (MANIFEST_NAME, INDEX_NAME)
    names = [name for name in MODEL.files if not name.endswith((".safetensors", ".pt"))]
    return [name for name in names if name not in generated and (source / name).is_file()]


def _state(source: Path, components: StoredComponents) -> dict[str, dict[str, int]]:
    """Size and modification time of every file that is read."""
    paths = {
        stored.file
        for _, entry in components.items()
        for stored in entry.component.store.tensors.values()
    }
    paths |= {source / name for name in (*_small_files(source), INDEX_NAME)}
    paths = {path for path in paths if path.is_file()}  # one file needs no index
    facts = {path.relative_to(source).as_posix(): path.stat() for path in sorted(paths)}
    return {name: {"size": s.st_size, "modified_ns": s.st_mtime_ns} for name, s in facts.items()}


def _plan(
    source: Path, components: StoredComponents, dtype: str, shard_bytes: int
) -> dict[str, NewFile]:
    """Every file of the slim checkpoint by its name."""
    files: dict[str, NewFile] = {
        name: SmallFile((source / name).read_bytes()) for name in _small_files(source)
    }
    for _, entry in components.items():
        tensors = component_tensors(entry, served=dtype == "served")
        if entry.folder:
            files[f"{entry.folder}/model.safetensors"] = TensorFile(tensors)
        else:
            files |= _language_model_files(tensors, shard_bytes)
    return files


def _language_model_files(tensors: list[NewTensor], shard_bytes: int) -> dict[str, NewFile]:
    """One file, or shards with their index, named as published."""
    shards: list[list[NewTensor]] = [[]]
    for tensor in tensors:
        size = sum(other.nbytes for other in shards[-1]) + tensor.nbytes
        if shards[-1] and size > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        return {"model.safetensors": TensorFile(tensors)}
    names = [f"model-{number}-of-{len(shards)}.safetensors" for number in range(1, len(shards) + 1)]
    named = dict(zip(names, shards, strict=True))
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
        "weight_map": {tensor.name: name for name, shard in named.items() for tensor in shard},
    }
    files: dict[str, NewFile] = {name: TensorFile(shard) for name, shard in named.items()}
    return files | {INDEX_NAME: SmallFile((json.dumps(index, indent=1) + "\n").encode())}


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Keep other processes from writing to the same place at the same time."""
    folder = (target / UNFINISHED_NAME).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise WeightsError(f"{target}: another process is writing to it") from error
    except OSError as error:
        raise WeightsError(f"{target}: cannot be written ({error})") from error
    try:
        yield
    finally:
        lock.release()


def _begun(target: Path, planned: CheckpointManifest) -> CheckpointManifest:
    """What an earlier call has done of the plan, or the plan itself."""
    unfinished = read_checkpoint_manifest(target / UNFINISHED_NAME)
    known = unfinished or read_checkpoint_manifest(target / MANIFEST_NAME) or planned
    if not known.files:
        return planned
    held = (known.quantization or {}).get("scheme", "none")
    begun = {"dtype": f"--dtype {known.dtype}", "quantization": f"--quantization {held}"}
    for field in ("dtype", "quantization", "shard_bytes", "sources", "source_files"):
        if getattr(known, field) != getattr(planned, field):
            what = begun.get(field, "another state of the source")
            raise WeightsError(
                f"{target}: was begun with {what}; name another directory or delete it"
            )
    return known


def _reopen(target: Path, known: CheckpointManifest) -> None:
    """From here on the target counts as unfinished, so that nobody serves it."""
    for rest in (target / UNFINISHED_NAME).parent.glob("*.part"):
        rest.unlink()
    if (target / MANIFEST_NAME).is_file():
        (target / MANIFEST_NAME).replace(target / UNFINISHED_NAME)
    else:
        known.write(target / UNFINISHED_NAME)


def _is_whole(
    target: Path, name: str, files: dict[str, NewFile], known: CheckpointManifest, bar: tqdm
) -> bool:
    path, entry = target / name, known.files.get(name)
    if entry is None or not path.is_file() or path.stat().st_size != entry.size:
        return False
    if entry.size != files[name].size or sha256_of(path) != entry.sha256:
        return False
    bar.update(entry.size)
    return True


def _require_space(target: Path, sizes: list[int]) -> None:
    needed, free = sum(sizes), shutil.disk_usage(target).free
    if needed > free:
        raise WeightsError(
            f"{target}: {needed:,} bytes are still to be written and {free:,} are free; free "
            f"{needed - free:,} bytes or name a directory on a larger disk"
        )


def _write(
    target: Path, name: str, file: NewFile, known: CheckpointManifest, reader: Reader, bar: tqdm
) -> None:
    part = (target / UNFINISHED_NAME).with_name(name.replace("/", "--") + ".part")
    try:
        known.files[name] = file.write(part, reader, bar.update)
        (target / name).parent.mkdir(exist_ok=True)
        part.replace(target / name)
        known.write(target / UNFINISHED_NAME)
    except OSError as error:
        raise WeightsError(
            f"{target / name}: cannot be written ({error}); the same command continues"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def _progress(files: dict[str, NewFile]) -> tqdm:
    interval = 0.5 if sys.stderr.isatty() else 30.0  # a log gets few lines
    return tqdm(
        desc=f"{len(files)} files",
        total=sum(file.size for file in files.values()),
        unit="B",
        unit_scale=True,
        mininterval=interval,
        maxinterval=max(interval, 10.0),
    )
