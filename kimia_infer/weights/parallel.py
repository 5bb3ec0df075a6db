"""Load components of a checkpoint with several readers at once, straight to the device."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor

from kimia_infer.weights.component import Component, Slot
from kimia_infer.weights.tensors import Reader, Report, StoredTensor

READERS = 8
"""Network disks and fast SSDs need several requests at a time; every reader has one block."""


def load_modules(
    components: Mapping[str, tuple[Component, torch.dtype]],
    device: torch.device,
    report: Report | None = None,
    checksum: Callable[[StoredTensor], int] | None = None,
    readers: int = READERS,
    mapped: bool = False,
) -> dict[str, Any]:
    """The modules of ``components``, each in its dtype on ``device``, ready for inference.

    ``report`` is called with the number of values read, by one thread at a time; ``checksum``
    returns the CRC-32 that a stored tensor must have. With ``mapped``, on the CPU, tensors that are
    used as they are stored are not copied; their files must stay.

    Raises:
        CheckpointError: a tensor is damaged or cannot be read; the first one found ends the
            work of all readers.
    """
    modules = {
        name: component.allocate(device, dtype) for name, (component, dtype) in components.items()
    }
    failures: list[BaseException] = []
    counting, own = threading.Lock(), threading.local()

    def prepare() -> None:
        own.reader = Reader(checksum)

    def count(values: int) -> None:
        with counting:
            if failures:
                raise CancelledError
            if report is not None:
                report(values)

    def fill(component: Component, parameters: dict[str, Tensor], slot: Slot) -> None:
        if not failures:
            try:
                done = mapped and component.map(slot, parameters[slot.parameter], own.reader, count)
                if not done:
                    component.place(slot, parameters, own.reader, count)
            except BaseException as error:
                failures.append(error)

    parameters = {name: dict(module.named_parameters()) for name, module in modules.items()}
    jobs = [
        (component, parameters[name], slot)
        for name, (component, _) in components.items()
        for slot in component.slots
    ]
    jobs.sort(key=lambda job: _order(job[0], job[2]))
    with ThreadPoolExecutor(readers, "weights", initializer=prepare) as pool:
        try:
            wait([pool.submit(fill, *job) for job in jobs])
        except BaseException as error:
            failures.append(error)
    if failures:
        raise failures[0]
    return modules


def _order(component: Component, slot: Slot) -> tuple[int, str, int]:
    """The largest first, so that all readers end together; others as they lie in their file."""
    tensors = [component.store.tensors[name] for name in slot.sources]
    return -sum(t.nbytes for t in tensors), str(tensors[0].file), tensors[0].offset
