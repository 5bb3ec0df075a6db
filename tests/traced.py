"""A stand-in for CUDA graphs on the CPU: operations are recorded once and replayed.

As in a CUDA graph, every Python value is frozen at recording, tensors are the very ones that the
work used then, and reading a value of the device while recording is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.engine.decode import Decoder
from kimia_infer.engine.scheduler import Scheduler
from kimia_infer.models.kimi_audio.detokenizer import Detokenizer
from kimia_infer.utils.graphs import Direct, Graphs, Work, graphs_for

aten = torch.ops.aten
READS = (aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default)
"""Operations that give the host a value, or a shape that depends on values."""


class Tape(TorchDispatchMode):
    """While it is active, writes down the operations that give or change values.

    Views need no record, since what they show stays in its place.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, tuple, dict, list[tuple[int, Tensor]]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            raise RuntimeError(f"{func}: reads a value while work is recorded")
        kwargs = kwargs or {}
        given = {id_of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **kwargs)
        made = [
            (place, tensor)
            for place, tensor in enumerate(tree_leaves(result))
            if isinstance(tensor, Tensor) and id_of(tensor) not in given
        ]
        if made or func._schema.is_mutable:
            self._calls.append((func, args, kwargs, made))
        return result

    @torch.inference_mode()
    def replay(self) -> None:
        for func, args, kwargs, made in self._calls:
            results = tree_leaves(func(*args, **kwargs))
            for place, tensor in made:
                tensor.copy_(results[place])


def id_of(tensor: Tensor) -> int:
    """Which memory a tensor is in."""
    return tensor.untyped_storage()._cdata


class TracedGraphs(Direct):
    """Behaves as CudaGraphs; ``recorded`` counts what was recorded, ``replayed`` the launches."""

    captures = True

    def __init__(self, device: torch.device):
        self.recorded = self.replayed = 0

    def record(self, work: Work) -> Work:
        work()  # as CudaGraphs does; the recording runs it again
        with Tape() as tape:
            work()
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            tape.replay()

        return replay


def record_steps(
    model: KimiAudio, slots: int = 2, capacity: int | None = None, places: int | None = None
) -> KimiAudio:
    """Have a model launch its steps and its speech as on a GPU: recorded, and polled late."""
    detokenizer = model.detokenizer
    if detokenizer is not None:
        model.detokenizer = Detokenizer(
            detokenizer.dit,
            detokenizer.vocoder,
            detokenizer.config,
            TracedGraphs(model.device),
            slots,
        )
    return set_slots(model, slots, capacity, places, TracedGraphs)


def set_slots(
    model: KimiAudio,
    slots: int,
    capacity: int | None = None,
    places: int | None = None,
    make_graphs: Callable[[torch.device], Graphs] = graphs_for,
) -> KimiAudio:
    """Give a model another decoder, and a scheduler for it."""
    old = model.decoder
    model.decoder = Decoder(
        old.model,
        old.control,
        capacity or old.capacity,
        make_graphs=make_graphs,
        slots=slots,
        places=places,
    )
    model.scheduler.stop()
    model.scheduler = Scheduler(model.decoder, model.detokenizer, model.encoder.encode)
    return model


class FixedShapes(Direct):
    """Launches directly what CudaGraphs would record, for work that cannot be traced.

    ``recorded`` counts that.
    """

    captures = True

    def __init__(self, device: torch.device):
        self.recorded = 0

    def record(self, work: Work) -> Work:
        self.recorded += 1
        return work
