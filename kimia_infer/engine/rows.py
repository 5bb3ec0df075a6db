"""The state of all running requests on the device, a row for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kimia_infer.layers.sampler import SamplingRows, TrackSampling, draw_dtype

T = TypeVar("T")


@dataclass
class TrackRows:
    """One track: ids of all steps, their draws, the last id, and the logits of the next.

    ``store`` int64 and ``uniforms`` [rows, steps + 1], as a finished row stays one step behind
    its last id; ``count`` int64 [rows] of ids that belong to the answer; ``latest`` int64
    [rows, 1]; ``logits`` [rows, ids].
    """

    store: Tensor
    uniforms: Tensor
    count: Tensor
    latest: Tensor
    logits: Tensor
    sampling: SamplingRows

    @classmethod
    def create(cls, rows: int, steps: int, head: nn.Linear, blank: int) -> TrackRows:
        """Rows for the ids of ``head``, of at most so many ``steps``."""
        device, dtype, ids = head.weight.device, head.weight.dtype, head.weight.shape[0]
        store = torch.full((rows, steps + 1), blank, device=device)
        return cls(
            store,
            torch.zeros_like(store, dtype=draw_dtype(device)),
            torch.zeros_like(store[:, 0]),
            torch.zeros_like(store[:, :1]),
            torch.zeros(rows, ids, dtype=dtype, device=device),
            SamplingRows.create(rows, device),
        )

    def begin(self, row: int, sampling: TrackSampling, uniforms: Tensor) -> None:
        self.count[row] = 0
        self.uniforms[row, : len(uniforms)] = uniforms.to(self.uniforms)
        self.sampling.put(row, sampling)

    def put(self, step: Tensor, chosen: Tensor) -> None:
        """Keep the ids int64 [rows] chosen at ``step`` int64 [rows]."""
        self.latest.copy_(chosen[:, None])
        self.store.scatter_(1, step[:, None], self.latest)


@dataclass
class Rows:
    """Both tracks, and how far each row is; int64 or bool [rows].

    ``start`` is where its places in the key/value cache begin, ``step`` the number of steps whose
    ids are chosen, ``position`` that of the last of them, ``limit`` the largest number of steps.
    A row that ``speaks`` has an audio track. ``ended`` says that the model ended the answer,
    ``finished`` that the row advances no more, ``broken`` that its logits were not finite.
    """

    text: TrackRows
    audio: TrackRows
    start: Tensor
    step: Tensor
    position: Tensor
    limit: Tensor
    speaks: Tensor
    text_ended: Tensor
    ended: Tensor
    finished: Tensor
    broken: Tensor

    @classmethod
    def create(cls, text: TrackRows, audio: TrackRows) -> Rows:
        """Rows of nobody."""
        numbers = (torch.zeros_like(text.count) for _ in range(4))
        flags = (torch.zeros_like(text.count, dtype=torch.bool) for _ in range(5))
        rows = cls(text, audio, *numbers, *flags)
        rows.finished.fill_(True)
        return rows

    def move(self, source: int, target: int) -> None:
        """Overwrite row ``target`` with row ``source``."""
        for tensor in tensors(self):
            tensor[target] = tensor[source]

    def clear(self, row: int, start: int) -> None:
        """A row of nobody, which reads and writes the place ``start`` of the cache alone."""
        self.finished[row] = True
        self.position[row] = 0
        self.start[row] = start


def narrowed(state: T, first: int, end: int) -> T:
    """The rows from ``first`` to ``end`` of a state, as views."""
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(state):  # pyrefly: ignore[bad-argument-type]
        value = getattr(state, field.name)
        fields[field.name] = (
            value[first:end] if isinstance(value, Tensor) else narrowed(value, first, end)
        )
    return type(state)(**fields)


def tensors(state: Any) -> Iterator[Tensor]:
    """All tensors of a state."""
    for field in dataclasses.fields(state):
        value = getattr(state, field.name)
        if isinstance(value, Tensor):
            yield value
        else:
            yield from tensors(value)
