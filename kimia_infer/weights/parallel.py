"""Load components of a checkpoint with several readers at once, straight to the device."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kimia_infer.weights.component import Component, Slot
from kimia_infer.weights.tensors import Reader, Report, StoredTensor

READERS = 8
"""Network disks and fast SSDs need several requests at a time; every reader has one block."""

JOB_BYTES = 128 * 2**20


@dataclass
class _Job:
    """Neighboring tensors of one file, read by one thread."""

    component: Component
    parameters: dict[str, Tensor]
    slots: list[Slot]
    nbytes: int


class _Stopped(Exception):
    """Another reader has failed."""


class _Work:
    """State shared by the readers: the count of values, and whether one of them has failed."""

    def __init__(self, report: Report | None, checksum: Callable[[StoredTensor], int] | None):
        self._report, self._checksum = report, checksum
        self.stopped = threading.Event()
        self._counting, self._own = threading.Lock(), threading.local()

    def prepare(self) -> None:
        """In each thread, before its first job."""
        self._own.reader = Reader(self._checksum)

    def run(self, job: _Job) -> None:
        for slot in job.slots:
            with self._stopping():
                job.component.place(slot, job.parameters, self._own.reader, self._count)

    def _count(self, values: int) -> None:
        with self._counting, self._stopping():
            if self._report is not None:
                self._report(values)

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """A failure in the block stops all readers; after one, no work begins."""
        if self.stopped.is_set():
            raise _Stopped
        try:
            yield
        except BaseException:
            self.stopped.set()
            raise


def load_modules(
    components: Mapping[str, tuple[Component, torch.dtype]],
    device: torch.device,
    report: Report | None = None,
    checksum: Callable[[StoredTensor], int] | None = None,
    readers: int = READERS,
) -> dict[str, Any]:
    """The modules of ``components``, each in its dtype on ``device``, ready for inference.

    ``report`` is called with the number of values read, by one thread at a time; ``checksum``
    returns the CRC-32 that a stored tensor must have. A pickle is read by one
    thread, everything else by ``readers``.

    Raises:
        CheckpointError: a tensor is damaged or cannot be read; the first one found ends the
            work of all readers.
    """
    modules = {
        name: component.allocate(device, dtype) for name, (component, dtype) in components.items()
    }
    jobs = [
        job
        for name, (component, _) in components.items()
        for job in _jobs(component, dict(modules[name].named_parameters()))
    ]
    jobs.sort(key=lambda job: -job.nbytes)  # the longest first, so that all end together
    work = _Work(report, checksum)
    with ThreadPoolExecutor(readers, "weights", initializer=work.prepare) as pool:
        try:
            for future in as_completed([pool.submit(work.run, job) for job in jobs]):
                if not isinstance(future.exception(), _Stopped):  # the failure comes, too
                    future.result()
        except BaseException:
            work.stopped.set()
            pool.shutdown(cancel_futures=True)
            raise
    return modules


def _jobs(component: Component, parameters: dict[str, Tensor]) -> Iterator[_Job]:
    """Cut a component into jobs of about JOB_BYTES; the tensors of a pickle stay together."""
    tensors = component.store.tensors

    def place(slot: Slot) -> tuple[str, int]:
        first = tensors[next(iter(slot.sources))]
        return str(first.file), first.offset or 0

    job, file = None, None
    for slot in sorted(component.slots, key=place):
        first = tensors[next(iter(slot.sources))]
        full = job is not None and job.nbytes >= JOB_BYTES and first.offset is not None
        if job is None or first.file != file or full:
            if job is not None:
                yield job
            job, file = _Job(component, parameters, [], 0), first.file
        job.slots.append(slot)
        job.nbytes += sum(tensors[name].nbytes for name in slot.sources)
    if job is not None:
        yield job
