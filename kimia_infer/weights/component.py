"""What a component of a model expects of a checkpoint, and how it is filled from one.

A component (language model, Whisper encoder, ...) is described by a list of :class:`Slot`:
which stored tensors fill which parameter. The same list says which tensors the checkpoint must
have, so that what is loaded and what is checked cannot drift apart.
"""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from kimia_infer.utils.errors import CheckpointError
from kimia_infer.weights.tensors import Reader, Report, TensorStore


@dataclass(frozen=True)
class Slot:
    """One parameter, or a run of its rows, and the stored tensors that fill it.

    ``sources`` maps published tensor names to their shapes. ``rows`` is the half-open range
    along the parameter's first dimension, or None for all of it. ``combine`` turns the stored
    tensors (in the order of ``sources``) into the value; without it there is one, which is the
    value. ``quantize`` turns the value of a matrix, row by row, into the values of several
    parameters of the same layer, by their names in it. ``dtype`` is the dtype in which the
    sources must be stored, None any floating one.
    """

    parameter: str
    sources: Mapping[str, tuple[int, ...]]
    rows: tuple[int, int] | None = None
    combine: Callable[..., Tensor] | None = None
    quantize: Callable[[Tensor], dict[str, Tensor]] | None = None
    dtype: torch.dtype | None = None

    def value(self, store: TensorStore, reader: Reader) -> Tensor:
        """The whole value, made from the sources in ``store``, on the CPU."""
        stored = [reader.tensor(store, name) for name in self.sources]
        return stored[0] if self.combine is None else self.combine(*stored)


def identity_slots(module: nn.Module) -> list[Slot]:
    """Slots for a module whose parameters are stored under their own names."""
    return [Slot(name, {name: tuple(p.shape)}) for name, p in module.named_parameters()]


def fold_weight_norm(g: Tensor, v: Tensor) -> Tensor:
    """The weight of a weight-normalized layer in fp32: v scaled to norm g per first index."""
    v = v.float()
    return v * (g.float() / torch.linalg.vector_norm(v, dim=(1, 2), keepdim=True))


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


Module = TypeVar("Module", bound=nn.Module)


@dataclass
class Component(Generic[Module]):
    """A module of the model with the tensors it expects and the files they come from.

    Creating one checks every name, shape and kind against the file headers, so a bad
    checkpoint is reported before any weight is loaded. ``ignored`` lists name patterns that
    a store may hold besides the slots; None allows anything.
    """

    name: str
    build: Callable[[], Module]
    slots: list[Slot]
    store: TensorStore
    ignored: tuple[str, ...] | None = field(default=None)

    def __post_init__(self) -> None:
        expected = expected_tensors(self.slots)
        for slot in self.slots:
            for name, shape in slot.sources.items():
                self._check(name, shape, slot.dtype)
        if self.ignored is None:
            return
        for name in self.store.tensors.keys() - expected.keys():
            if not any(fnmatch.fnmatch(name, pattern) for pattern in self.ignored):
                raise CheckpointError(
                    f"{self.store.tensors[name].file}: tensor {name} has no place in the "
                    f"{self.name} that the configuration describes"
                )

    def _check(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
        stored = self.store.tensors.get(name)
        if stored is None:
            raise CheckpointError(f"{self.store.location}: tensor {name} is missing ({self.name})")
        if stored.shape != shape:
            raise CheckpointError(
                f"{stored.file}: tensor {name} has shape {list(stored.shape)}, "
                f"expected {list(shape)}"
            )
        if dtype is not None and stored.dtype is not dtype:
            raise CheckpointError(
                f"{stored.file}: tensor {name} holds {stored.dtype}, expected {dtype}"
            )
        if dtype is None and not stored.floating:
            raise CheckpointError(f"{stored.file}: tensor {name} does not hold floating point")

    @property
    def elements(self) -> int:
        """Number of stored values that loading reads."""
        return sum(math.prod(shape) for shape in expected_tensors(self.slots).values())

    def load(
        self, device: torch.device, dtype: torch.dtype, report: Report | None = None
    ) -> Module:
        """Build the module and fill it; ``report`` is called with the number of values read."""
        module = self.allocate(device, dtype)
        parameters = dict(module.named_parameters())
        reader = Reader()
        for slot in self.slots:
            self.place(slot, parameters, reader, report)
        return module

    def allocate(self, device: torch.device, dtype: torch.dtype) -> Module:
        """Build the module for inference, with parameters whose values are undefined.

        They have ``dtype``, except those that are not built in float32.
        """
        with torch.device("meta"):
            module = self.build()
        for name, parameter in list(module.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            kept = dtype if parameter.dtype is torch.float32 else parameter.dtype
            empty = torch.empty(parameter.shape, device=device, dtype=kept)
            setattr(module.get_submodule(owner), leaf, nn.Parameter(empty, requires_grad=False))
        return module.eval()

    def place(
        self,
        slot: Slot,
        parameters: Mapping[str, Tensor],
        reader: Reader,
        report: Report | None = None,
    ) -> None:
        """Fill the parameters of ``slot`` among the module's ``parameters``."""
        if slot.quantize is None:
            self.fill(slot, parameters[slot.parameter], reader, report)
            return
        layer = slot.parameter.rpartition(".")[0]
        device = parameters[slot.parameter].device
        value = slot.value(self.store, reader)
        for leaf, quantized in slot.quantize(value.to(device)).items():
            _rows(parameters[f"{layer}.{leaf}"], slot).copy_(quantized)
        if report is not None:
            report(value.numel())

    def map(self, slot: Slot, parameter: Tensor, reader: Reader, report: Report) -> bool:
        """Let ``parameter`` on the CPU be the pages of the file that hold its value.

        The checksum is verified. False if the value is made from what is stored.
        """
        name = next(iter(slot.sources))
        stored = self.store.tensors[name]
        made = slot.combine or slot.quantize or slot.rows or stored.strides
        if made or stored.dtype is not parameter.dtype or not stored.nbytes:
            return False
        for block in reader.blocks(self.store, name):
            report(block.numel())
        parameter.data = self.store.mapped(name)
        return True

    def fill(
        self, slot: Slot, parameter: Tensor, reader: Reader, report: Report | None = None
    ) -> None:
        """Fill ``parameter``, or the rows of it that ``slot`` names."""
        target = _rows(parameter, slot)
        if slot.combine is None:
            (name,) = slot.sources
            reader.into(self.store, name, target, report)
            return
        target.copy_(slot.value(self.store, reader))
        if report is not None:
            report(sum(math.prod(shape) for shape in slot.sources.values()))


def _rows(parameter: Tensor, slot: Slot) -> Tensor:
    return parameter.data if slot.rows is None else parameter.data[slot.rows[0] : slot.rows[1]]


def expected_tensors(slots: Iterable[Slot]) -> dict[str, tuple[int, ...]]:
    """Every stored tensor that ``slots`` need, with its shape."""
    return {name: shape for slot in slots for name, shape in slot.sources.items()}


def plain_component(
    name: str, build: Callable[[], Module], store: TensorStore
) -> Component[Module]:
    """A module whose parameters are stored under their own names, and nothing else is."""
    with torch.device("meta"):
        slots = identity_slots(build())
    return Component(name, build, slots, store, ignored=())
