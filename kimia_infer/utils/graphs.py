"""Record device work once and launch it many times: CUDA graphs.

The only module that uses torch.cuda. Another accelerator with a graph mode needs a class with the
methods of :class:`Direct` here, and nothing else.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

Work = Callable[[], None]


class HostCopy(NamedTuple):
    """A copy on its way to the host: whether it is there, and the tensor, waited for."""

    done: Callable[[], bool]
    wait: Callable[[], Tensor]


class Direct:
    """Launches work operation by operation, and reads results at once."""

    captures = False

    def record(self, work: Work) -> Work:
        """A function that launches ``work``, which has neither arguments nor a result.

        Where graphs are captured, ``work`` runs once first and is then frozen: its tensors keep
        their addresses and shapes, its Python values their values.
        """
        return work

    def copy_to_host(self, values: Tensor) -> HostCopy:
        """Begin to copy ``values`` to the host, after the work launched so far in this stream."""
        copy = values.cpu()
        return HostCopy(lambda: True, lambda: copy)

    def upload(self, values: Tensor, device: torch.device) -> Tensor:
        """``values`` on ``device``; the host does not wait for it."""
        return values.to(device)

    def stream(self) -> contextlib.AbstractContextManager:
        """Work launched within may run concurrently with that of other streams."""
        return contextlib.nullcontext()


class CudaGraphs:
    """CUDA graphs that share one memory pool, so only one of them may run at a time."""

    captures = True
    # PyTorch allows one recording at a time in a process.
    _recording: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, device: torch.device):
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            # One stream for all recordings, as sharing memory between them requires.
            self._recorder = torch.cuda.Stream(device)
            self._stream = torch.cuda.Stream(device)

    def record(self, work: Work) -> Work:
        """See :meth:`Direct.record`."""
        graph = torch.cuda.CUDAGraph()
        with self._recording:
            current = torch.cuda.current_stream(self._recorder.device)
            self._recorder.wait_stream(current)
            with torch.cuda.stream(self._recorder):
                work()  # compiles kernels and sets up libraries, which cannot be captured
            # Other threads may go on allocating memory.
            with torch.cuda.graph(
                graph, self._pool, self._recorder, capture_error_mode="thread_local"
            ):
                work()
            current.wait_stream(self._recorder)
        return graph.replay

    def copy_to_host(self, values: Tensor) -> HostCopy:
        """See :meth:`Direct.copy_to_host`."""
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(values.device))

        def wait() -> Tensor:
            copied.synchronize()
            return host

        return HostCopy(copied.query, wait)

    def upload(self, values: Tensor, device: torch.device) -> Tensor:
        """See :meth:`Direct.upload`."""
        source = values if values.is_cuda else values.pin_memory()
        return source.to(device, non_blocking=True)

    def stream(self) -> contextlib.AbstractContextManager:
        """See :meth:`Direct.stream`."""
        return torch.cuda.stream(self._stream)


Graphs = Direct | CudaGraphs


def graphs_for(device: torch.device) -> Graphs:
    """How work is launched on ``device``; memory is shared within each result."""
    return CudaGraphs(device) if device.type == "cuda" else Direct()


class Recorded:
    """A function of tensors, recorded for the shapes of those given to :meth:`record`.

    For other shapes, and where nothing is recorded, it is launched operation by operation. Each
    shape has one dtype. The result belongs to the caller. Not to be used by two threads at once.
    """

    def __init__(self, function: Callable[..., Tensor], graphs: Graphs):
        self.function, self.graphs = function, graphs
        self._recorded: dict[tuple[torch.Size, ...], tuple[list[Tensor], Work, list[Tensor]]] = {}

    def __call__(self, *tensors: Tensor) -> Tensor:
        recording = self._recorded.get(_shapes(tensors))
        if recording is None:
            return self.function(*tensors)
        given, launch, results = recording
        for place, tensor in zip(given, tensors, strict=True):
            place.copy_(tensor)
        launch()
        return results[0].clone()

    def record(self, *tensors: Tensor) -> None:
        """Record the shapes of these tensors, whose values do not matter."""
        shapes = _shapes(tensors)
        if self.graphs.captures and shapes not in self._recorded:
            self._recorded[shapes] = self._record(tensors)

    def _record(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Work, list[Tensor]]:
        """What is read, how it is launched, and, once it has run, the result."""
        with torch.inference_mode(False):  # so that they can be written in any mode
            given = [torch.empty_like(t) for t in tensors]
        results: list[Tensor] = []

        def work() -> None:
            result = self.function(*given)
            if not results:
                with torch.inference_mode(False):
                    results.append(torch.empty_like(result))
            results[0].copy_(result)

        for place, tensor in zip(given, tensors, strict=True):
            place.copy_(tensor)
        return given, self.graphs.record(work), results


def _shapes(tensors: Sequence[Tensor]) -> tuple[torch.Size, ...]:
    return tuple(tensor.shape for tensor in tensors)
