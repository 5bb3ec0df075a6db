"""Load parts of a checkpoint with several readers at once, straight to the device."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kimia_infer.weights.checkpoint import Part, Slot
from kimia_infer.weights.tensors import Reader, Report, StoredTensor

READERS = 8
"""Network disks and fast SSDs need several requests at a time; every reader holds one block."""

JOB_BYTES = 128 * 2**20


@dataclass
class _Job:
    """Neighboring tensors of one file, read by one thread."""

    part: Part
    parameters: dict[str, Tensor]
    slots: list[Slot]
    nbytes: int


class _Stopped(Exception):
    """Another reader has failed."""


def load_parts(
    parts: Sequence[tuple[Part, torch.dtype]],
    device: torch.device,
    report: Report | None = None,
    checksum: Callable[[StoredTensor], int] | None = None,
    readers: int = READERS,
) -> list[nn.Module]:
    """The modules of ``parts``, each in its dtype on ``device``, ready for inference.

    ``report`` gets the number of values read each time, from one thread at a time;
    ``checksum`` gives the CRC-32 that a stored tensor must have. A pickle is read by one
    thread, everything else by ``readers``.

    Raises:
        CheckpointError: a tensor is damaged or cannot be read; the first one found ends the
            work of all readers.
    """
    modules = [part.allocate(device, dtype) for part, dtype in parts]
    jobs = [
        job
        for (part, _), module in zip(parts, modules, strict=True)
        for job in _jobs(part, dict(module.named_parameters()))
    ]
    jobs.sort(key=lambda job: -job.nbytes)  # the longest first, so that all end together
    stopped, counting, own = threading.Event(), threading.Lock(), threading.local()

    @contextmanager
    def stopping() -> Iterator[None]:
        """A failure within ends the work of all; after one, nothing begins."""
        if stopped.is_set():
            raise _Stopped
        try:
            yield
        except BaseException:
            stopped.set()
            raise

    def count(values: int) -> None:
        with counting, stopping():
            if report is not None:
                report(values)

    def prepare() -> None:
        own.reader = Reader(checksum)

    def run(job: _Job) -> None:
        for slot in job.slots:
            with stopping():
                job.part.place(slot, job.parameters, own.reader, count)

    with ThreadPoolExecutor(readers, "weights", initializer=prepare) as pool:
        try:
            for future in as_completed([pool.submit(run, job) for job in jobs]):
                if not isinstance(future.exception(), _Stopped):  # the failure comes, too
                    future.result()
        except BaseException:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise
    return modules


def _jobs(part: Part, parameters: dict[str, Tensor]) -> Iterator[_Job]:
    """Cut a part into jobs of about JOB_BYTES; what comes from a pickle stays together."""
    tensors = part.store.tensors

    def place(slot: Slot) -> tuple[str, int]:
        first = tensors[next(iter(slot.sources))]
        return str(first.file), first.offset or 0

    job, file = None, None
    for slot in sorted(part.slots, key=place):
        first = tensors[next(iter(slot.sources))]
        full = job is not None and job.nbytes >= JOB_BYTES and first.offset is not None
        if job is None or first.file != file or full:
            if job is not None:
                yield job
            job, file = _Job(part, parameters, [], 0), first.file
        job.slots.append(slot)
        job.nbytes += sum(tensors[name].nbytes for name in slot.sources)
    if job is not None:
        yield job
