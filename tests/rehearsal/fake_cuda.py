"""CUDA devices that are not there: tensors without values, and a ledger of what is done to them.

Under FakeTensorMode a mixed device, a wrong dtype in a product and a value that the host reads
raise. What the mode does not know is added here: what may be recorded in a graph, the dtypes of
every operation and the memory that tensors take.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kimia_infer.layers import operators
from kimia_infer.models.kimi_audio.flow import StreamConfig, ode_timesteps
from kimia_infer.models.kimi_audio.vocoder import low_pass_filter
from kimia_infer.utils import graphs
from kimia_infer.utils.graphs import Direct, HostCopy, Work
from kimia_infer.weights import parallel
from kimia_infer.weights.tensors import TensorStore

CUDA, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
CARD_BYTES = 80 * 10**9


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among the arguments or results of an operation, lists of them included."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_in(value)
    return found


class CannotBeRecorded(RuntimeError):
    """A CUDA graph cannot hold what was done while recording."""


class HostWaits(RuntimeError):
    """The host would wait for a device, or a device for memory that is not pinned."""


class Call(NamedTuple):
    """An operation: its name, the dtypes that it read, and the devices of all its tensors.

    ``outputs`` are dtype and size of the results that are not on the host.
    """

    name: str
    inputs: tuple[torch.dtype, ...]
    outputs: tuple[tuple[torch.dtype, int], ...]
    devices: frozenset[torch.device]


class Ledger(TorchDispatchMode):
    """Counts the bytes of live tensors on devices, and lists operations within :meth:`calls`.

    While ``recording`` a graph of a device, an operation that has a tensor elsewhere raises.
    """

    def __init__(self) -> None:
        super().__init__()
        self.recording: torch.device | None = None
        self.launching = self.uploading = False
        self.live = self.peak = 0
        self._calls: list[Call] | None = None
        self._storages: dict[int, weakref.ref] = {}

    @contextmanager
    def calls(self) -> Iterator[list[Call]]:
        """The operations within."""
        before, self._calls = self._calls, []
        try:
            yield self._calls
        finally:
            self._calls = before

    @contextmanager
    def without_waiting(self) -> Iterator[None]:
        """Within, only ``upload`` of the graphs may move values between host and device."""
        self.launching = True
        try:
            yield
        finally:
            self.launching = False

    @contextmanager
    def peak_within(self) -> Iterator[list[int]]:
        """A list that gets the most bytes that were live at once."""
        self.peak, found = self.live, []
        yield found
        found.append(self.peak)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach_.default and not isinstance(args[0], FakeTensor):
            return args[0]  # of torch.tensor on the meta device, which the mode does not expect
        name = func.name().partition("::")[2].partition(".")[0]
        if name in ("to", "_to_copy") and isinstance(args[0], FakeTensor):
            args[0].constant = None  # else the mode copies a scalar that it knows in earnest
        given = [*tensors_in(args), *tensors_in((kwargs or {}).values())]
        result = func(*args, **(kwargs or {}))
        made = tensors_in((result,))
        devices = frozenset(x.device for x in given + made)
        if self.recording is not None and devices - {self.recording}:
            raise CannotBeRecorded(f"{name} moves values between devices: {set(devices)}")
        if self.launching and not self.uploading and len(devices) > 1:
            raise HostWaits(f"{name} moves values between devices: {set(devices)}")
        if func.namespace == "kimia" and (len(devices) > 1 or not made[0].is_cuda):
            raise RuntimeError(f"{name} got tensors on {set(devices)}")  # no fake checks this
        for tensor in made:
            if tensor.is_cuda:
                self._count(tensor)
        if self._calls is not None:
            outputs = tuple((x.dtype, x.numel()) for x in made if x.is_cuda)
            self._calls.append(Call(name, tuple(x.dtype for x in given), outputs, devices))
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        known = self._storages.get(key)
        if known is not None and known() is storage:
            return

        def freed(reference: weakref.ref) -> None:
            self.live -= size
            if self._storages.get(key) is reference:
                del self._storages[key]

        self._storages[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)


FINISHED = 5
"""Column of a poll of the decoder."""


class FakeGraphs(Direct):
    """Stands for CudaGraphs: work runs once, under the rules of recording, and never again."""

    captures = True
    ledger: Ledger

    def __init__(self, device: torch.device):
        assert device.type == "cuda"
        self.device, self.polls = device, 0

    def record(self, work: Work) -> Work:
        self.ledger.recording = self.device
        try:
            work()
        finally:
            self.ledger.recording = None
        return lambda: None

    def upload(self, values: Tensor, device: torch.device) -> Tensor:
        self.ledger.uploading = True
        try:
            return values.to(device)
        finally:
            self.ledger.uploading = False

    def copy_to_host(self, values: Tensor) -> HostCopy:
        """Of a poll zeros, but that every third one says that all rows are finished."""
        assert values.device == self.device
        if values.dtype is not torch.int64:
            return HostCopy(lambda: True, lambda: torch.zeros(values.shape, dtype=values.dtype))
        self.polls += 1
        row = [0] * values.shape[1]
        row[FINISHED] = int(self.polls % 3 == 0)
        copy: Any = SimpleNamespace(tolist=lambda: [row] * len(values))
        return HostCopy(lambda: True, lambda: copy)


class Inline(Executor):
    """An executor whose work runs at once, in the thread and the modes of the caller."""

    def __init__(self, workers: int, name: str, initializer: Callable[[], None]):
        initializer()

    def submit(self, function: Callable, /, *arguments: Any, **keywords: Any) -> Future:
        future: Future = Future()
        future.set_result(function(*arguments, **keywords))
        return future


def no_values(self: TensorStore, name: str, buffer: Tensor) -> Iterator[Tensor]:
    """Instead of :meth:`TensorStore.blocks`: one block, of which nothing is read."""
    stored = self.tensors[name]
    yield torch.empty(stored.shape, dtype=stored.dtype).view(-1)


class FakeCuda:
    """Within :meth:`active`, CUDA and SECOND can be used; what asks the driver is answered here."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.ledger = FakeGraphs.ledger = Ledger()
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        free = CARD_BYTES, CARD_BYTES
        patch.setattr(graphs, "CudaGraphs", FakeGraphs)
        patch.setattr(
            operators, "missing", lambda device: None if device.type == "cuda" else "no GPU"
        )
        patch.setattr(torch.accelerator, "synchronize", lambda device=None: None)
        patch.setattr(torch.accelerator, "empty_cache", lambda: None)
        patch.setattr(torch.accelerator, "get_memory_info", lambda device=None: free)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        patch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
        patch.setattr(TensorStore, "blocks", no_values)
        patch.setattr(parallel, "ThreadPoolExecutor", Inline)
        # Constants, which are computed on the host once.
        low_pass_filter()
        ode_timesteps(StreamConfig().ode_points)

    @contextmanager
    def active(self) -> Iterator[Ledger]:
        with self._mode, self.ledger, torch.inference_mode():
            yield self.ledger
