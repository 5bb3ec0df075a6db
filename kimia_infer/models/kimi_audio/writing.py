"""New checkpoint files: their size is known before they are written, their checksums after."""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from kimia_infer.models.kimi_audio.components import StoredComponent
from kimia_infer.weights.component import Slot
from kimia_infer.weights.manifest import FileEntry
from kimia_infer.weights.tensors import DTYPES, Reader, Report, TensorStore

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written: what it is called and what it is made from.

    ``combine`` turns the stored tensors ``sources`` into the value; a single one is taken as
    it is. Either is then cast to ``dtype``.
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


def component_tensors(entry: StoredComponent, served: bool) -> list[NewTensor]:
    """What a slim checkpoint stores of a component, by published names.

    ``served``: combined tensors under the names of their parameters, everything in the dtype
    that it has in a model served in bfloat16. Otherwise the stored tensors as they are. What is
    quantized is so in both cases.
    """
    store = entry.component.store
    tensors = []
    for slot in entry.component.slots:
        if slot.quantize is not None:
            tensors += _quantized_tensors(entry, slot)
            continue
        if served and slot.combine is not None:
            stored = [torch.empty(shape, device="meta") for shape in slot.sources.values()]
            shape = tuple(slot.combine(*stored).shape)
            whole = [(slot.parameter, shape, tuple(slot.sources), slot.combine)]
        else:
            whole = [(name, shape, (name,), None) for name, shape in slot.sources.items()]
        for name, shape, sources, combine in whole:
            kept = store.tensors[sources[0]].dtype
            dtype = entry.served(torch.bfloat16) if served else kept
            tensors.append(NewTensor(entry.prefix + name, shape, dtype, store, sources, combine))
    return tensors


def _quantized_tensors(entry: StoredComponent, slot: Slot) -> list[NewTensor]:
    """A matrix under its published name; what else holds it has a name that begins so."""
    ((name, shape),) = slot.sources.items()
    held = slot.quantize(torch.empty(shape, device="meta"))

    def made(leaf: str) -> Callable[[Tensor], Tensor]:
        return lambda value: slot.quantize(value)[leaf]

    return [
        NewTensor(
            entry.prefix + (name if leaf == "weight" else f"{name}_{leaf}"),
            tuple(value.shape),
            value.dtype,
            entry.component.store,
            (name,),
            made(leaf),
        )
        for leaf, value in held.items()
    ]


class NewFile(Protocol):
    """A file that can be written."""

    @property
    def size(self) -> int:
        """In bytes."""

    def write(self, path: Path, reader: Reader, report: Report) -> FileEntry:
        """Write to ``path``, through to the disk; ``report`` gets the bytes written each time."""


@dataclass(frozen=True)
class SmallFile:
    """A configuration or the like."""

    content: bytes

    @property
    def size(self) -> int:
        return len(self.content)

    def write(self, path: Path, reader: Reader, report: Report) -> FileEntry:
        with path.open("wb") as file:
            file.write(self.content)
            _flush(file)
        report(self.size)
        return FileEntry(self.size, hashlib.sha256(self.content).hexdigest())


class TensorFile:
    """A safetensors file; widest elements first, so that every tensor is aligned."""

    def __init__(self, tensors: list[NewTensor]):
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

    def write(self, path: Path, reader: Reader, report: Report) -> FileEntry:
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
            _flush(file)
        return FileEntry(self.size, digest.hexdigest(), zlib.crc32(self.header), checksums)


def _flush(file) -> None:
    file.flush()
    os.fsync(file.fileno())
