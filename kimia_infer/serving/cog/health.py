"""Whether the device computes, and whether Cog's server still gives out its slots."""

from __future__ import annotations

import http.client
import json
import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch

from kimia_infer.serving.client import open_url

GRACE_SECONDS = 30.0
"""How much longer than its limit a prediction may take before the model counts as stuck."""


@dataclass
class Load:
    """``begun`` predictions so far; those ``running`` by thread, since when (monotonic seconds)."""

    begun: int = 0
    running: dict[int, float] = field(default_factory=dict)


class DeviceError(RuntimeError):
    """The model cannot answer; the message says why."""


class SlotLost(RuntimeError):
    """The server gives its slots to nobody any more."""


class Health:
    """Watches the devices of the model.

    Cog (0.23) calls the health check on a new thread for every request to ``/health-check``,
    once at a time, also while predictions run, and waits up to 5 seconds for it. During that
    wait it takes no cancellation, so :meth:`check` must be quick.

    ``timeout`` is the limit in seconds of one prediction, None without a limit.
    """

    def __init__(self, devices: Collection[torch.device], load: Load, timeout: float | None = None):
        self._devices, self._load, self._timeout = devices, load, timeout
        self.lost_after: int | None = None
        self._asked: tuple[torch.device, float] | None = None

    def check(self) -> None:
        """Return if every device computes, or works on predictions within their limit.

        Raises DeviceError if one does not answer or computes nonsense, SlotLost if no prediction
        has begun after ``lost_after``, and whatever PyTorch raises for a device that is lost or
        has no memory left.
        """
        if self.lost_after == self._load.begun:
            raise SlotLost(
                "the server counts predictions that the model does not have and takes no other "
                "(docs/deploy.md: prediction ids)"
            )
        now, limit = time.monotonic(), self._timeout
        if (asked := self._asked) is not None:
            raise DeviceError(f"{asked[0]} has not answered for {now - asked[1]:.0f} s")
        oldest = min(list(self._load.running.values()), default=None)
        if oldest is not None:  # a busy device is left alone
            if limit is not None and now - oldest > limit + GRACE_SECONDS:
                raise DeviceError(
                    f"a prediction has run for {now - oldest:.0f} s, though its limit is "
                    f"{limit:g} s"
                )
            return
        try:
            for device in self._devices:
                self._asked = device, now
                numbers = torch.arange(256, device=device, dtype=torch.float32)
                total = (numbers * numbers).sum().item()
                if total != sum(i * i for i in range(256)):
                    raise DeviceError(f"{device} computes wrong results: {total}")
        finally:
            self._asked = None


class SlotWatch:
    """Notices when Cog's server is BUSY without a prediction.

    It (0.23) loses a slot if it can make no directory for the id of a prediction, or cannot store
    a large request on a full disk, and is BUSY forever when it has lost all. ``status`` asks it
    for its state, None if it is silent.
    """

    def __init__(self, health: Health, load: Load, status: Callable[[], str | None]):
        self._health, self._load, self._status = health, load, status
        self._suspected: int | None = None

    def check(self) -> None:
        """Between two checks the server has time to begin or to end a prediction."""
        count = self._load.begun
        if self._load.running or self._status() != "BUSY" or self._load.begun != count:
            self._suspected = None
        elif self._suspected == count:
            self._health.lost_after = count
        else:
            self._suspected = count


def server_status() -> str | None:
    """The state that the server of this worker gives itself."""
    url = f"http://127.0.0.1:{os.environ.get('PORT', '5000')}/health-check"
    try:
        with open_url(url, timeout=8.0) as response:
            return json.load(response).get("status")
    except (OSError, http.client.HTTPException, ValueError):
        return None  # it may listen on another address only
