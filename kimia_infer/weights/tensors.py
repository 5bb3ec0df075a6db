"""The stored tensors of a checkpoint: described by file headers, read on demand.

Host memory stays at one block per reader: files are read block by block, so that each block can go
straight to its device and dtype.
"""

from __future__ import annotations

import math
import pickle
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kimia_infer.utils.errors import CheckpointError
from kimia_infer.weights.header import INDEX_NAME, read_header, read_index

BLOCK_BYTES = 16 * 2**20
"""Bytes of a file that are read at a time."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Element types of the safetensors format that PyTorch has, by the names of the format."""

Report = Callable[[int], object]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as its file describes it.

    ``name`` is its full name in ``file``. ``dtype`` is None where PyTorch has no such type.
    ``offset`` is where its bytes begin, ``strides`` the strides of a pickled tensor whose elements
    are stored in another order.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    offset: int
    strides: tuple[int, ...] | None = None

    @property
    def readable_dtype(self) -> torch.dtype:
        """``dtype``. Raises CheckpointError where PyTorch has no such type."""
        if self.dtype is None:
            raise CheckpointError(f"{self.file}: tensor {self.name} has a type PyTorch lacks")
        return self.dtype

    @property
    def floating(self) -> bool:
        return self.dtype is not None and self.dtype.is_floating_point

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * (self.dtype.itemsize if self.dtype else 0)


class TensorStore:
    """Named tensors of one component, described by file headers and read on demand.

    ``location`` is the file or directory that they come from, for messages.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor], location: Path):
        self.tensors = dict(tensors)
        self.location = location

    def blocks(self, name: str, buffer: Tensor) -> Iterator[Tensor]:
        """The values in order as flat tensors; each is valid until the next one is read.

        They are read into ``buffer`` (uint8, a multiple of 8 bytes). Several threads may do this
        at once, each with its own buffer.
        """
        stored = self.tensors[name]
        with stored.file.open("rb", buffering=0) as file:
            file.seek(stored.offset)
            if stored.strides is not None:
                ends = zip(stored.strides, stored.shape, strict=True)
                count = 1 + sum(stride * (size - 1) for stride, size in ends)
                values = torch.empty(count, dtype=stored.dtype)
                _read_fully(file, memoryview(values.view(torch.uint8).numpy()))
                yield values.as_strided(stored.shape, stored.strides).reshape(-1)
                return
            left = stored.nbytes
            while left:
                block = buffer[: min(left, len(buffer))]
                _read_fully(file, memoryview(block.numpy()))
                yield block.view(stored.readable_dtype)
                left -= len(block)

    def mapped(self, name: str) -> Tensor:
        """The whole tensor as pages of its file, which are read when they are used.

        What is written to it stays with this process.
        """
        stored = self.tensors[name]
        shape = (stored.nbytes,)
        pages = np.memmap(stored.file, np.uint8, mode="c", offset=stored.offset, shape=shape)
        return torch.from_numpy(pages).view(stored.readable_dtype).view(stored.shape)

    def under(self, *prefixes: str) -> TensorStore:
        """The tensors below the first of ``prefixes`` that occurs, with the prefix removed.

        A prefix may occur anywhere in a name; what precedes it is removed, too. An empty
        prefix matches every name.
        """
        for prefix in prefixes:
            found = {n: t for n, t in self.tensors.items() if prefix in n}
            if found:
                short = {n.split(prefix, 1)[1] if prefix else n: t for n, t in found.items()}
                return TensorStore(short, self.location)
        raise CheckpointError(
            f"{self.location}: no tensor whose name contains "
            + " or ".join(repr(p) for p in prefixes)
        )


def _read_fully(file: FileIO, room: memoryview) -> None:
    while room:
        count = file.readinto(room)
        if not count:
            raise OSError("the file ends inside the tensor")
        room = room[count:]


class Reader:
    """Reads stored tensors through one buffer; every thread needs its own.

    ``checksum`` returns the CRC-32 that the bytes of a tensor must have; None: not checked.
    """

    def __init__(self, checksum: Callable[[StoredTensor], int] | None = None):
        self._buffer = torch.empty(BLOCK_BYTES, dtype=torch.uint8)
        self._checksum = checksum

    def blocks(self, store: TensorStore, name: str) -> Iterator[Tensor]:
        """:meth:`TensorStore.blocks`, verified: a damaged tensor raises after its last block.

        Raises:
            CheckpointError: the tensor cannot be read or its checksum is another one.
        """
        stored = store.tensors[name]
        expected = None if self._checksum is None else self._checksum(stored)
        found = 0
        blocks = store.blocks(name, self._buffer)
        while True:
            try:
                block = next(blocks, None)
            except (OSError, RuntimeError) as error:
                raise CheckpointError(f"{stored.file}: tensor {stored.name}: {error}") from error
            if block is None:
                break
            if expected is not None:
                found = zlib.crc32(block.view(torch.uint8).numpy(), found)
            yield block
        if expected is not None and found != expected:
            raise CheckpointError(
                f"{stored.file}: tensor {stored.name} is damaged: its CRC-32 is {found:08x}, the "
                f"manifest says {expected:08x}; copy or prepare the file again"
            )

    def tensor(self, store: TensorStore, name: str) -> Tensor:
        """A whole tensor on the CPU."""
        stored = store.tensors[name]
        value = torch.empty(stored.shape, dtype=stored.dtype)
        self.into(store, name, value)
        return value

    def into(
        self, store: TensorStore, name: str, target: Tensor, report: Report | None = None
    ) -> None:
        """Fill the contiguous ``target``; ``report`` is called with the number of values read."""
        target, start = target.view(-1), 0
        for block in self.blocks(store, name):
            target[start : start + block.numel()].copy_(block)
            start += block.numel()
            if report is not None:
                report(block.numel())


def open_directory(directory: Path) -> TensorStore:
    """Open the safetensors of ``directory``: sharded with an index, or a ``model.safetensors``.

    The index alone decides which shard holds a tensor (the published shard names are
    irregular: 35 files ``-of-35`` and one ``36-of-36``).
    """
    index_path = directory / INDEX_NAME
    if not index_path.is_file():
        return open_safetensors([directory / "model.safetensors"])
    shards = {name: directory / shard for name, shard in read_index(index_path).items()}
    return open_safetensors(sorted(set(shards.values())), shards)


def open_safetensors(paths: Iterable[Path], index: Mapping[str, Path] | None = None) -> TensorStore:
    """Open safetensors files lazily; their headers are read and checked now.

    ``index`` names the file of each tensor, where that is known.
    """
    paths = list(paths)
    headers = {path: _stored_tensors(path) for path in paths}
    tensors = {name: stored for header in headers.values() for name, stored in header.items()}
    for name, path in (index or {}).items():
        if name not in headers[path]:
            raise CheckpointError(f"{path}: tensor {name}, which the index places here, is missing")
        tensors[name] = headers[path][name]
    return TensorStore(tensors, paths[0] if len(paths) == 1 else paths[0].parent)


def _stored_tensors(path: Path) -> dict[str, StoredTensor]:
    header = read_header(path)
    try:
        with safe_open(path, framework="pt"):
            pass  # opening it checks what is left to check
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return {
        name: StoredTensor(
            path,
            name,
            tuple(entry["shape"]),
            DTYPES.get(entry["dtype"]),
            header.start + entry["data_offsets"][0],
        )
        for name, entry in header.entries.items()
    }


def open_pickle(path: Path, section: str | None) -> TensorStore:
    """Open the tensors below ``section`` of a torch pickle without running code from it.

    None stands for the top, where there are no sections.

    Only the places of the values are read, so that tensors that are not needed (the published
    detokenizer has 12 GB of optimizer state) are never read from disk.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: file missing")
    try:
        content = torch.load(path, map_location="meta", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: refused, not a plain tensor pickle ({reason})") from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path}: unreadable or truncated ({error})") from error
    tensors = content
    if section is not None:
        tensors = content.get(section) if isinstance(content, dict) else None
    if not isinstance(tensors, dict):
        missing = "tensors by name are" if section is None else f"entry {section!r} is"
        raise CheckpointError(f"{path}: {missing} missing")
    described = {n: _pickled_tensor(path, n, t) for n, t in tensors.items() if torch.is_tensor(t)}
    return TensorStore(described, path)


def _pickled_tensor(path: Path, name: str, tensor: Tensor) -> StoredTensor:
    """The description of a tensor that was loaded without its values."""
    storage: Any = tensor.untyped_storage()
    offset = storage._checkpoint_offset + tensor.storage_offset() * tensor.itemsize
    strides = None if tensor.is_contiguous() else tensor.stride()
    return StoredTensor(path, name, tuple(tensor.shape), tensor.dtype, offset, strides)


def open_model_file(directory: Path, section: str) -> TensorStore:
    """``model.safetensors`` of ``directory`` if it exists, else ``section`` of its ``model.pt``."""
    if (directory / "model.safetensors").is_file():
        return open_safetensors([directory / "model.safetensors"])
    return open_pickle(directory / "model.pt", section)
