"""Seconds of what is done on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch


def synchronize(device: torch.device) -> None:
    """Wait for what was launched on an accelerator."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@torch.inference_mode()
def medians(
    actions: Sequence[Callable[[], object]], runs: int, device: torch.device
) -> list[float]:
    """Median seconds of each action over interleaved runs, after one that does not count."""
    seconds: list[list[float]] = [[] for _ in actions]
    for run in range(runs + 1):
        for action, values in zip(actions, seconds, strict=True):
            synchronize(device)
            start = time.perf_counter()
            action()
            synchronize(device)
            if run > 0:
                values.append(time.perf_counter() - start)
    return [statistics.median(values) for values in seconds]
