"""How the service answers many predictions of Cog's server at a time, and cancels each.

The server gives every prediction to a slot. For an asynchronous ``run``, a thread of the slot calls
``asyncio.run_coroutine_threadsafe`` with Cog's event loop and waits for the future. As Cog (0.23.1)
does it, the items of an asynchronous iterator are sent when the last is known. Those of an ordinary
iterator that ``run`` returns are sent at once, but a cancellation does not reach it. A canceled
``run`` loses its slot before it has ended, and goes on without one if it was canceled while it was
submitted. So :func:`run_on_slots` answers the call with a :class:`SlotPrediction`: the thread that
waits executes ``run``, and a cancellation ends its Deadline.

The same thread must hold nothing that has to be cleaned up, and start no thread: a cancellation
while the prediction is submitted reaches it by PyThreadState_SetAsyncExc, between any two bytecodes
or on a thread that it is starting. So another thread makes the answer (``Workers`` of the runner).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from contextvars import ContextVar
from typing import Any, cast

from kimia_infer.api.request import Deadline

DEADLINE: ContextVar[Deadline] = ContextVar("deadline")
"""The end of the prediction that the thread executes."""

COG_SUBMITS = "_ctx_wrapper"
"""Name of the coroutine around ``run`` that Cog submits."""


def max_concurrency() -> int:
    """The predictions that Cog admits at a time, as it reads them from the environment."""
    value = os.environ.get("COG_MAX_CONCURRENCY", "")
    return max(int(value), 1) if value.isdecimal() else 1


class SlotPrediction:
    """What Cog gets in the place of a future: ``run`` on the thread that waits for its result."""

    def __init__(self, run: Coroutine[Any, Any, Any], deadline: Deadline):
        self._run, self._deadline = run, deadline

    def result(self) -> Any:
        """What ``run``, which awaits nothing, returns or raises."""
        DEADLINE.set(self._deadline)
        try:
            self._run.send(None)
        except StopIteration as ended:
            return ended.value
        raise RuntimeError("run() awaits something, but no event loop executes it")

    def cancel(self) -> bool:
        """End the request; the slot is free when ``run``, or the iterator it returned, ends."""
        self._deadline.cancel()
        return True


def run_on_slots(timeout: float | None) -> None:
    """Execute the predictions of this process on the threads of their slots.

    ``timeout`` is the limit of each in seconds.
    """
    submit = asyncio.run_coroutine_threadsafe

    def submit_or_run(coroutine: Any, loop: asyncio.AbstractEventLoop) -> Any:
        if coroutine.__name__ != COG_SUBMITS:  # of a library
            return submit(coroutine, loop)
        return SlotPrediction(coroutine, Deadline(timeout))

    asyncio.run_coroutine_threadsafe = cast(Any, submit_or_run)
