"""What ends a request from outside: its time limit, and memory that is not there."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Generator
from typing import TypeVar

import torch

from kimia_infer.utils.errors import RequestOutOfMemory, RequestTimeout

Item = TypeVar("Item")


class Deadline:
    """The end of the time that a request may take, counted from now on; None for no limit."""

    def __init__(self, seconds: float | None):
        self.seconds = seconds
        self._end = math.inf if seconds is None else time.monotonic() + seconds

    def check(self) -> None:
        """Raise RequestTimeout once the time is over."""
        if time.monotonic() > self._end:
            raise RequestTimeout(
                f"timeout_seconds: the answer was not complete within {self.seconds:g} s; allow "
                "more time, or ask for less (max_new_tokens, shorter sound or text)"
            )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation has failed; on the CPU PyTorch tells so by its message alone."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or "DefaultCPUAllocator:" in str(error)


def surviving_out_of_memory(items: Generator[Item]) -> Generator[Item]:
    """``items``; running out of memory becomes one RequestOutOfMemory and leaves nothing behind.

    What the failed call held is freed before the error is raised, and the allocator's idle
    memory goes back to the device, so that the next request finds it. Closing this iterator
    closes ``items``.
    """
    try:
        yield from items
        return
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or ["MemoryError"])[0]
        # Every frame on the way refers to tensors, and the traceback to the frames.
        traceback.clear_frames(error.__traceback__)
    del items
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    raise RequestOutOfMemory(
        f"out of memory while answering ({reason}); send less sound, text or history, or a "
        "smaller max_new_tokens. The memory is free again for other requests"
    )
