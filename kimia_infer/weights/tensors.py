"""The stored tensors of a checkpoint: described by file headers, read on demand.

Host memory stays at one block per reader: safetensors are read block by block, so that each block
can go straight to its device and dtype, and pickles are memory mapped.
"""

from __future__ import annotations

import math
import pickle
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kimia_infer.utils.errors import CheckpointError
from kimia_infer.weights.header import INDEX_NAME, read_header, read_index

BLOCK_BYTES = 16 * 2**20
"""Bytes of a safetensors file that are read at a time."""

MAPPED_BYTES = 512 * 2**20
"""Bytes of a pickle that are read before it is mapped again."""

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
    ``offset`` is where its bytes begin in a safetensors file, None in a pickle.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    offset: int | None

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

    ``location`` is the file or directory that they come from, for messages. ``pickled`` gives
    the tensors of a pickle by their full names.
    """

    def __init__(
        self,
        tensors: Mapping[str, StoredTensor],
        location: Path,
        pickled: Callable[[str], Tensor] | None = None,
    ):
        self.tensors = dict(tensors)
        self.location = location
        self._pickled = pickled

    def blocks(self, name: str, buffer: Tensor) -> Iterator[Tensor]:
        """The values in order as flat tensors; each is valid until the next one is read.

        Blocks of safetensors are read into ``buffer`` (uint8, a multiple of 8 bytes), which
        several threads may do at once, each with its own. A pickled tensor is one memory-mapped
        block, and only one thread may ask for it at a time.
        """
        stored = self.tensors[name]
        if stored.offset is None:
            assert self._pickled is not None
            yield self._pickled(stored.name).reshape(-1)
            return
        room = memoryview(buffer.numpy())
        with stored.file.open("rb", buffering=0) as file:
            file.seek(stored.offset)
            left = stored.nbytes
            while left:
                size = min(left, len(room))
                _read_fully(file, room[:size])
                yield buffer[:size].view(stored.readable_dtype)
                left -= size

    def under(self, *prefixes: str) -> TensorStore:
        """The tensors below the first of ``prefixes`` that occurs, with the prefix removed.

        A prefix may occur anywhere in a name; what precedes it is removed, too. An empty
        prefix matches every name.
        """
        for prefix in prefixes:
            found = {n: t for n, t in self.tensors.items() if prefix in n}
            if found:
                short = {n.split(prefix, 1)[1] if prefix else n: t for n, t in found.items()}
                return TensorStore(short, self.location, self._pickled)
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


def open_pickle(path: Path, section: str) -> TensorStore:
    """Open the tensors below ``section`` of a torch pickle without running code from it.

    Memory mapped, so that tensors that are not needed (the published detokenizer has 12 GB of
    optimizer state) are never read from disk; mapped again after every ``MAPPED_BYTES``, so that
    pages already used do not count as memory in use.
    """
    tensors = _map_pickle(path, section)
    used = 0

    def load(name: str) -> Tensor:
        nonlocal tensors, used
        if used > MAPPED_BYTES:
            tensors, used = {}, 0  # unmap first
            tensors = _map_pickle(path, section)
        used += tensors[name].nbytes
        return tensors[name]

    described = {
        name: StoredTensor(path, name, tuple(tensor.shape), tensor.dtype, None)
        for name, tensor in tensors.items()
    }
    return TensorStore(described, path, load)


def _map_pickle(path: Path, section: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path}: file missing")
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: refused, not a plain tensor pickle ({reason})") from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path}: unreadable or truncated ({error})") from error
    tensors = content.get(section) if isinstance(content, dict) else None
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{path}: entry {section!r} is missing")
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}


def open_model_file(directory: Path, section: str) -> TensorStore:
    """``model.safetensors`` of ``directory`` if it exists, else ``section`` of its ``model.pt``."""
    if (directory / "model.safetensors").is_file():
        return open_safetensors([directory / "model.safetensors"])
    return open_pickle(directory / "model.pt", section)
