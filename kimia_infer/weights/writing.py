"""Write checkpoints: safetensors files block by block, and directories that can be continued.

The size of a new file is known before it is written, its checksums afterwards.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from kimia_infer.utils.errors import WeightsError
from kimia_infer.utils.files import PARTIAL, locked, replacing
from kimia_infer.utils.progress import progress
from kimia_infer.weights.header import INDEX_NAME
from kimia_infer.weights.layout import UNFINISHED_NAME
from kimia_infer.weights.manifest import (
    MANIFEST_NAME,
    CheckpointManifest,
    FileEntry,
    read_checkpoint_manifest,
    sha256_of,
)
from kimia_infer.weights.tensors import DTYPES, Reader, Report, TensorStore

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written: its name and what it is made from.

    ``combine`` turns the stored tensors ``sources`` into the value; without it a single one is
    the value. It is cast to ``dtype``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    store: TensorStore
    sources: tuple[str, ...]
    combine: Callable[..., Tensor] | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def blocks(self, reader: Reader) -> Iterator[memoryview]:
        """The bytes of the value, in pieces that are valid until the next is asked for."""
        if self.combine is None:
            values = reader.blocks(self.store, *self.sources)
        else:
            whole = [reader.tensor(self.store, name) for name in self.sources]
            values = iter([self.combine(*whole).reshape(-1)])
        for value in values:
            yield memoryview(value.to(self.dtype).view(torch.uint8).numpy())


@dataclass(frozen=True)
class SmallFile:
    """A file of known content, such as a configuration."""

    content: bytes

    @property
    def size(self) -> int:
        return len(self.content)

    def write(self, path: Path, reader: Reader, report: Report) -> FileEntry:
        path.write_bytes(self.content)
        report(self.size)
        return FileEntry(self.size, hashlib.sha256(self.content).hexdigest())


class TensorFile:
    """A safetensors file; widest elements first, so that every tensor is aligned.

    Tensors are :class:`NewTensor` or have the same name, shape, dtype, nbytes and blocks.
    """

    tensors: list[Any]

    def __init__(self, tensors: Sequence[Any]):
        self.tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)

    @cached_property
    def header(self) -> bytes:
        """Length and JSON header, padded so that the data begin at a multiple of 8."""
        entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for tensor in self.tensors:
            entries[tensor.name] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset + tensor.nbytes],
            }
            offset += tensor.nbytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def size(self) -> int:
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)

    def write(self, path: Path, reader: Reader | None, report: Report) -> FileEntry:
        digest = hashlib.sha256(self.header)
        checksums: dict[str, int] = {}
        with path.open("wb") as file:
            file.write(self.header)
            report(len(self.header))
            for tensor in self.tensors:
                checksum = 0
                for block in tensor.blocks(reader):
                    file.write(block)
                    digest.update(block)
                    checksum = zlib.crc32(block, checksum)
                    report(len(block))
                checksums[tensor.name] = checksum
        return FileEntry(self.size, digest.hexdigest(), zlib.crc32(self.header), checksums)


class NewFile(Protocol):
    """What is written to a file: :class:`SmallFile`, :class:`TensorFile` or the like.

    ``size`` is the number of its bytes, or about that if it is known only afterwards.
    """

    @property
    def size(self) -> int: ...

    def write(self, path: Path, reader: Reader, report: Report) -> FileEntry:
        """Write it to ``path``; ``report`` is called with the number of bytes written."""
        ...


def tensor_files(tensors: list[NewTensor], shard_bytes: int) -> dict[str, NewFile]:
    """``model.safetensors``, or shards of at most ``shard_bytes`` with their index."""
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


def require_usable(source: Path, target: Path) -> None:
    """Raise WeightsError if writing to ``target`` could overwrite anything else."""
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


def write_checkpoint(
    target: Path,
    planned: CheckpointManifest,
    files: Mapping[str, NewFile],
    reader: Reader,
    check_source: Callable[[], None],
) -> CheckpointManifest:
    """Write ``files`` to ``target``, or continue what an earlier call has begun.

    Files appear in ``target`` when they are complete, and the manifest comes last. In a finished
    ``target`` every file is verified, and damaged ones are written again.

    Args:
        target: the directory to write, checked by :func:`require_usable`.
        planned: the manifest without ``files``; an earlier call must have had the same.
        files: what to write, by relative names.
        reader: reads the source.
        check_source: raises if the source changed while it was read.

    Raises:
        WeightsError: ``target`` cannot be written, has too little space, or was begun with
            another plan; or another process is writing to it.
    """
    folder = (target / UNFINISHED_NAME).parent
    with _locked(target, folder / "lock"):
        written = _begun(target, planned)
        total = sum(file.size for file in files.values())
        with progress(f"{len(files)} files", total, "B", unit_scale=True) as bar:
            todo = {
                name: file
                for name, file in files.items()
                if not _is_intact(target / name, file, written.files.get(name))
            }
            needed = sum(file.size for file in todo.values())
            bar.update(total - needed)
            if todo or not (target / MANIFEST_NAME).is_file():
                _reopen(target, written)
                _require_space(target, needed)
                for name, file in todo.items():
                    _write(target, name, file, written, reader, bar.update)
                check_source()
                (target / UNFINISHED_NAME).replace(target / MANIFEST_NAME)
        shutil.rmtree(folder)
    return written


@contextmanager
def _locked(target: Path, lock: Path) -> Iterator[None]:
    try:
        with locked(lock):
            yield
    except BlockingIOError as error:
        raise WeightsError(f"{target}: another process is writing to it") from error
    except OSError as error:
        raise WeightsError(f"{target}: cannot be written ({error})") from error


def _begun(target: Path, planned: CheckpointManifest) -> CheckpointManifest:
    """The manifest of what an earlier call has written, else ``planned``."""
    unfinished = read_checkpoint_manifest(target / UNFINISHED_NAME)
    found = unfinished or read_checkpoint_manifest(target / MANIFEST_NAME)
    if found is None or not found.files:
        return planned
    scheme = (found.quantization or {}).get("scheme", "none")
    options = {
        "dtype": f"--dtype {found.dtype}",
        "quantization": f"--quantization {scheme}",
        "packed": "--for cpu" if found.packed else "no --for",
    }
    for field in (*options, "shard_bytes", "sources", "source_files"):
        if getattr(found, field) != getattr(planned, field):
            option = options.get(field, "another state of the source")
            raise WeightsError(
                f"{target}: was begun with {option}; name another directory or delete it"
            )
    return found


def _reopen(target: Path, written: CheckpointManifest) -> None:
    """Mark the target as unfinished, so that it is not served meanwhile."""
    for partial in (target / UNFINISHED_NAME).parent.glob(f"*{PARTIAL}"):
        partial.unlink()
    if (target / MANIFEST_NAME).is_file():
        (target / MANIFEST_NAME).replace(target / UNFINISHED_NAME)
    else:
        written.write(target / UNFINISHED_NAME)


def _is_intact(path: Path, file: NewFile, entry: FileEntry | None) -> bool:
    if entry is None or not path.is_file():
        return False
    exact = isinstance(file, (SmallFile, TensorFile))
    size = file.size if exact else entry.size
    return path.stat().st_size == entry.size == size and sha256_of(path) == entry.sha256


def _require_space(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target).free
    if needed > free:
        raise WeightsError(
            f"{target}: {needed:,} bytes are still to be written and {free:,} are free; free "
            f"{needed - free:,} bytes or name a directory on a larger disk"
        )


def _write(
    target: Path,
    name: str,
    file: NewFile,
    written: CheckpointManifest,
    reader: Reader,
    report: Report,
) -> None:
    unfinished = target / UNFINISHED_NAME
    try:
        with replacing(target / name, unfinished.parent) as partial:
            written.files[name] = file.write(partial, reader, report)
        written.write(unfinished)
    except OSError as error:
        raise WeightsError(
            f"{target / name}: cannot be written ({error}); the same command continues"
        ) from error
