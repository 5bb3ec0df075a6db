"""Read the tensors of a checkpoint into modules, one tensor at a time.

A part of the model (language model, Whisper encoder, ...) is described by a list of
:class:`Slot`: which stored tensors fill which parameter. The same list is the manifest of
the checkpoint that the part expects, so what is loaded, what is checked and what is
documented cannot drift apart. Host memory stays at what a single tensor needs, because
files are memory mapped and every tensor goes straight to its device and dtype.
"""

from __future__ import annotations

import fnmatch
import json
import math
import pickle
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

MAPPED_BYTES = 512 * 2**20  # of a pickle, read before it is mapped afresh

Report = Callable[[int], None]


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the message names the file, the tensor and the reason."""


@dataclass(frozen=True)
class Slot:
    """One parameter, or a run of its rows, and the stored tensors that fill it.

    ``sources`` maps published tensor names to their shapes. ``rows`` is the half-open range
    along the parameter's first dimension, or None for all of it. ``combine`` turns the
    stored tensors (in order of ``sources``) into the value; a single one is taken as it is.
    """

    parameter: str
    sources: Mapping[str, tuple[int, ...]]
    rows: tuple[int, int] | None = None
    combine: Callable[..., Tensor] | None = None


def identity_slots(module: nn.Module) -> list[Slot]:
    """Slots for a module whose parameters are stored under their own names."""
    return [Slot(name, {name: tuple(p.shape)}) for name, p in module.named_parameters()]


@dataclass(frozen=True)
class StoredTensor:
    """What the headers say of a tensor: its file, its shape, whether it holds floats."""

    file: Path
    shape: tuple[int, ...]
    floating: bool


class TensorStore:
    """Named tensors of one checkpoint part, described by file headers and read on demand.

    ``location`` is the file or directory that they come from, for messages.
    """

    def __init__(
        self,
        tensors: Mapping[str, StoredTensor],
        load: Callable[[str], Tensor],
        location: Path,
    ):
        self.tensors = dict(tensors)
        self.location = location
        self._load = load

    def load(self, name: str) -> Tensor:
        """The tensor on the CPU, memory mapped where the file format allows it."""
        return self._load(name)

    def under(self, *prefixes: str) -> TensorStore:
        """The tensors below the first of ``prefixes`` that occurs, with the prefix removed.

        A prefix may stand anywhere in a name; what precedes it is dropped too. An empty
        prefix matches every name.
        """
        for prefix in prefixes:
            names = {n.split(prefix, 1)[1] if prefix else n: n for n in self.tensors if prefix in n}
            if names:
                return TensorStore(
                    {short: self.tensors[full] for short, full in names.items()},
                    lambda short, names=names: self._load(names[short]),
                    self.location,
                )
        raise CheckpointError(
            f"{self.location}: no tensor whose name contains "
            + " or ".join(repr(p) for p in prefixes)
        )


def open_directory(directory: Path) -> TensorStore:
    """Open the safetensors of ``directory``: sharded with an index, or a ``model.safetensors``.

    The index alone decides which shard holds a tensor (the published shard names are
    irregular: 35 files ``-of-35`` and one ``36-of-36``).
    """
    index_path = directory / "model.safetensors.index.json"
    if not index_path.is_file():
        return open_safetensors([directory / "model.safetensors"])
    try:
        weight_map = json.loads(index_path.read_text())["weight_map"]
        names = {name: Path(shard).name for name, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index_path}: not a safetensors index ({error})") from error
    for name, shard in weight_map.items():
        if names[name] != shard:
            raise CheckpointError(
                f"{index_path}: tensor {name} is said to be in {shard!r}, outside the directory"
            )
    shards = {name: directory / shard for name, shard in names.items()}
    return open_safetensors(sorted(set(shards.values())), shards)


def open_safetensors(paths: Iterable[Path], index: Mapping[str, Path] | None = None) -> TensorStore:
    """Open safetensors files lazily; their headers are read and checked now.

    ``index`` says which file holds a tensor, where that is known. Only the file that was
    read last stays mapped, so that the pages of the others do not count as memory in use.
    """
    paths = list(paths)
    headers = {path: _read_header(path) for path in paths}
    tensors = {name: stored for header in headers.values() for name, stored in header.items()}
    for name, path in (index or {}).items():
        if name not in headers[path]:
            raise CheckpointError(f"{path}: tensor {name}, which the index places here, is missing")
        tensors[name] = headers[path][name]
    opened = lru_cache(maxsize=1)(_open_shard)
    return TensorStore(
        tensors,
        lambda name: opened(tensors[name].file).get_tensor(name),
        paths[0] if len(paths) == 1 else paths[0].parent,
    )


def _read_header(path: Path) -> dict[str, StoredTensor]:
    shard = _open_shard(path)
    slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118
    return {
        # Names of float types are F64 .. F8_E4M3 and BF16, of others I64, U8, BOOL ...
        name: StoredTensor(path, tuple(s.get_shape()), s.get_dtype().startswith(("F", "BF")))
        for name, s in slices.items()
    }


def _open_shard(path: Path):
    if not path.is_file():
        raise CheckpointError(f"{path}: file missing")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {_damage(path) or error}") from error


def _damage(path: Path) -> str | None:
    """Name the first tensor of a safetensors file that lies beyond its end, if any does."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size:
                return "file truncated inside its header"
            header = json.loads(file.read(length))
        ends = {n: 8 + length + e["data_offsets"][1] for n, e in header.items() if n[:2] != "__"}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError):
        return None
    lost = sorted((end, name) for name, end in ends.items() if end > size)
    if not lost:
        return None
    return f"file truncated: tensor {lost[0][1]} needs {lost[0][0]} bytes, the file has {size}"


def open_pickle(path: Path, section: str) -> TensorStore:
    """Open the tensors below ``section`` of a torch pickle without running code from it.

    Memory mapped, so that what is not asked for (the published detokenizer carries 12 GB of
    optimizer state) is never read from disk; mapped afresh after every ``MAPPED_BYTES``, so
    that pages already used do not count as memory in use.
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
        name: StoredTensor(path, tuple(tensor.shape), tensor.is_floating_point())
        for name, tensor in tensors.items()
    }
    return TensorStore(described, load, path)


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


def read_json(path: Path) -> dict:
    """A JSON object from a checkpoint, or :class:`CheckpointError`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: file missing") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return value


@dataclass
class Part:
    """One module of the model with the tensors it expects and the place they come from.

    Creating a part checks every name, shape and kind against the file headers, so a bad
    checkpoint is reported before any weight is loaded. ``ignored`` lists name patterns that
    a store may hold besides the slots; None allows anything.
    """

    name: str
    build: Callable[[], nn.Module]
    slots: list[Slot]
    store: TensorStore
    ignored: tuple[str, ...] | None = field(default=None)

    def __post_init__(self) -> None:
        expected = manifest(self.slots)
        for name, shape in expected.items():
            self._check(name, shape)
        if self.ignored is None:
            return
        for name in self.store.tensors.keys() - expected.keys():
            if not any(fnmatch.fnmatch(name, pattern) for pattern in self.ignored):
                raise CheckpointError(
                    f"{self.store.tensors[name].file}: tensor {name} has no place in the "
                    f"{self.name} that the configuration describes"
                )

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        stored = self.store.tensors.get(name)
        if stored is None:
            raise CheckpointError(f"{self.store.location}: tensor {name} is missing ({self.name})")
        if stored.shape != shape:
            raise CheckpointError(
                f"{stored.file}: tensor {name} has shape {list(stored.shape)}, "
                f"expected {list(shape)}"
            )
        if not stored.floating:
            raise CheckpointError(f"{stored.file}: tensor {name} does not hold floating point")

    @property
    def elements(self) -> int:
        """Stored values that loading reads."""
        return sum(math.prod(shape) for shape in manifest(self.slots).values())

    def load(
        self, device: torch.device, dtype: torch.dtype, report: Report | None = None
    ) -> nn.Module:
        """Build the module and fill it; ``report`` gets the number of values read each time."""
        with torch.device("meta"):
            module = self.build()
        for name, parameter in list(module.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            empty = torch.empty(parameter.shape, device=device, dtype=dtype)
            setattr(module.get_submodule(owner), leaf, nn.Parameter(empty, requires_grad=False))
        parameters = dict(module.named_parameters())
        for slot in self.slots:
            self._fill(slot, parameters[slot.parameter].data, report)
        return module.eval()

    def _fill(self, slot: Slot, target: Tensor, report: Report | None) -> None:
        values = [self._read(name) for name in slot.sources]
        value = slot.combine(*values) if slot.combine else values[0]
        if slot.rows is not None:
            target = target[slot.rows[0] : slot.rows[1]]
        target.copy_(value)
        if report is not None:
            report(sum(math.prod(shape) for shape in slot.sources.values()))

    def _read(self, name: str) -> Tensor:
        try:
            return self.store.load(name)
        except (SafetensorError, RuntimeError, OSError) as error:
            file = self.store.tensors[name].file
            raise CheckpointError(f"{file}: tensor {name}: {error}") from error


def manifest(slots: Iterable[Slot]) -> dict[str, tuple[int, ...]]:
    """Every stored tensor that ``slots`` need, with its shape."""
    return {name: shape for slot in slots for name, shape in slot.sources.items()}
