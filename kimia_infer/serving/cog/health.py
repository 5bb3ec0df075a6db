"""Whether the device still computes: what Cog's health check asks."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import torch

GRACE_SECONDS = 30.0
"""How much longer than its limit a prediction may take before the model counts as stuck."""


class DeviceError(RuntimeError):
    """The model cannot answer; the message says why."""


class Health:
    """Watches one device.

    Cog (0.23) calls the health check on a new thread for every request to ``/health-check``,
    once at a time, also while a prediction runs, and waits up to 5 seconds for it. During that
    wait it takes no cancellation, so :meth:`check` must be quick.

    ``timeout`` is the limit in seconds of one prediction, None without a limit.
    """

    def __init__(self, device: torch.device, timeout: float | None = None):
        self._device = device
        self._timeout = timeout
        self._gate = threading.Lock()
        self._predicting_since: float | None = None
        self._probing_since: float | None = None

    @contextlib.contextmanager
    def predicting(self) -> Iterator[None]:
        """Around every prediction: the device belongs to it alone."""
        with self._gate:
            self._predicting_since = time.monotonic()
            try:
                yield
            finally:
                self._predicting_since = None

    def check(self) -> None:
        """Return if the device computes, or is at work for a prediction within its limit.

        Raises DeviceError if it does not answer or computes nonsense, and whatever PyTorch
        raises for a device that is lost or has no memory left.
        """
        self._check_running()
        # A busy device is left alone.
        if not self._gate.acquire(blocking=False):
            return
        try:
            self._probing_since = time.monotonic()
            probe = torch.arange(256, device=self._device, dtype=torch.float32)
            total = (probe * probe).sum().item()
        finally:
            self._probing_since = None
            self._gate.release()
        if total != sum(i * i for i in range(256)):
            raise DeviceError(f"{self._device} computes wrong results: {total}")

    def _check_running(self) -> None:
        now = time.monotonic()
        since = self._probing_since
        if since is not None:
            raise DeviceError(f"{self._device} has not answered for {now - since:.0f} s")
        since = self._predicting_since
        if since is None or self._timeout is None:
            return
        if now - since > self._timeout + GRACE_SECONDS:
            raise DeviceError(
                f"a prediction has run for {now - since:.0f} s, though its limit is "
                f"{self._timeout:g} s"
            )
