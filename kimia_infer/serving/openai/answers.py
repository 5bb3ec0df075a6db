"""Answers for an event loop: threads read the model's events, the loop sends them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from starlette.requests import Request

from kimia_infer.api.request import Deadline
from kimia_infer.utils.errors import RequestCancelled, ServiceBusy

Item = TypeVar("Item")
Result = TypeVar("Result")

BUSY_RETRY_MS = 1000
"""When to try again after a refusal for lack of a thread."""


class Answers:
    """Runs up to ``limit`` answers at a time, each on a thread that waits for the engine.

    ``timeout`` is the most seconds that an answer may take, None for no limit.
    """

    def __init__(self, limit: int, timeout: float | None):
        self._pool = ThreadPoolExecutor(limit, thread_name_prefix="answer")
        self._limit, self._timeout = limit, timeout
        self._deadlines: set[Deadline] = set()

    @property
    def running(self) -> int:
        return len(self._deadlines)

    async def stream(self, begin: Callable[[Deadline], Generator[Item]]) -> AsyncGenerator[Item]:
        """What the iterator made by ``begin(deadline)`` yields, as it comes.

        Closing this iterator, or cancelling the task that reads it, cancels the deadline, which
        ends the request within a step; the thread is not waited for.

        Raises ServiceBusy if all threads are taken, and what the iterator raises.
        """
        if self.running >= self._limit:
            raise ServiceBusy(self.running, BUSY_RETRY_MS)
        loop, deadline = asyncio.get_running_loop(), Deadline(self._timeout)
        arrived: asyncio.Queue[Item | _End] = asyncio.Queue()

        def send(item: Item | _End) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped
                loop.call_soon_threadsafe(arrived.put_nowait, item)

        def read() -> None:
            end = _End(None)
            try:
                with contextlib.closing(begin(deadline)) as items:
                    for item in items:
                        send(item)
            except BaseException as error:
                end = _End(error)
            loop.call_soon_threadsafe(self._deadlines.discard, deadline)
            send(end)

        self._deadlines.add(deadline)
        self._pool.submit(read)
        try:
            while not isinstance(item := await arrived.get(), _End):
                yield item
            if item.error is not None:
                raise item.error
        finally:
            deadline.cancel()

    async def last(self, begin: Callable[[Deadline], Generator[Item]]) -> Item:
        """The last item of :meth:`stream`: the whole of an answer."""
        async with contextlib.aclosing(self.stream(begin)) as items:
            return [item async for item in items][-1]

    async def call(self, function: Callable[[Deadline], Result]) -> Result:
        """What ``function(deadline)`` returns, computed by a thread."""

        def once(deadline: Deadline) -> Generator[Result]:
            yield function(deadline)

        return await self.last(once)

    def close(self) -> None:
        """End all answers; no further ones begin."""
        for deadline in list(self._deadlines):
            deadline.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True)
class _End:
    """Comes after the last item."""

    error: BaseException | None


async def while_connected(request: Request, work: Awaitable[Result]) -> Result:
    """What ``work`` results in; it is cancelled as soon as the client of ``request`` hangs up.

    The body of the request must have been read. Raises RequestCancelled then.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise RequestCancelled("the client hung up")
        return task.result()
    finally:
        for future in (task, gone):
            future.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
