"""A clock that a test sets, for one module."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest


def set_clock(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, monotonic: Callable[[], float]
) -> None:
    """Let ``module`` read the monotonic clock from ``monotonic``.

    That of the process stays as it is: timers of servers and event loops in it depend on it.
    """
    clock = SimpleNamespace(**{**vars(time), "monotonic": monotonic})
    monkeypatch.setattr(module, "time", clock)
