"""Answers that are sent while they are made."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kimia_infer.serving.openai.answers import while_connected
from kimia_infer.serving.openai.errors import ApiError, as_api_error
from kimia_infer.utils.errors import RequestCancelled, RequestError

Item = TypeVar("Item")

KEEP_ALIVE_SECONDS = 15.0
"""Longest silence in a stream of events; proxies commonly cut connections after 30 to 60 s."""

KEEP_ALIVE = b": keep-alive\n\n"
"""A comment, which clients ignore."""


class Streamed(Response):
    """A response whose body is made of ``pieces``; they are closed once the client has hung up.

    Make one with :func:`streamed` or :func:`event_stream`.
    """

    def __init__(self, pieces: AsyncGenerator[bytes], media_type: str):
        headers = {"content-type": media_type, "cache-control": "no-cache"}
        super().__init__(headers=headers | {"x-accel-buffering": "no"})
        self.pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_all() -> None:
            headers = [item for item in self.raw_headers if item[0] != b"content-length"]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async with contextlib.aclosing(self.pieces) as pieces:
                async for piece in pieces:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        with contextlib.suppress(RequestCancelled, OSError):  # nobody is there to be told
            await while_connected(Request(scope, receive), send_all())


async def streamed(request: Request, pieces: AsyncGenerator[bytes], media_type: str) -> Streamed:
    """A response of ``pieces``, once the first is known: errors before it have their status.

    An error after it ends the connection before the body is complete.
    """
    first = await while_connected(request, anext(pieces, b""))

    async def all_pieces() -> AsyncGenerator[bytes]:
        async with contextlib.aclosing(pieces):
            yield first
            async for piece in pieces:
                yield piece

    return Streamed(all_pieces(), media_type)


async def event_stream(
    request: Request,
    events: AsyncGenerator[Mapping[str, Any]],
    end: bytes = b"",
    names: Mapping[str, str] | None = None,
) -> Streamed:
    """Server-sent events of JSON, then ``end``; comments keep the connection alive in pauses.

    An error before the first line has its HTTP status; a later one is the last event, under the
    key ``error``, where OpenAI's clients raise it. ``names`` are those of ``as_api_error``.
    """

    async def lines() -> AsyncGenerator[bytes]:
        begun = False
        try:
            async with contextlib.aclosing(with_pauses(events)) as found:
                async for event in found:
                    yield KEEP_ALIVE if event is None else data_line(event)
                    begun = True
            if end:
                yield end
        except RequestError as error:
            refusal = as_api_error(error, names)
            if not begun:
                raise refusal from error
            yield data_line({"error": refusal.error})
        except ApiError as error:
            if not begun:
                raise
            yield data_line({"error": error.error})

    return await streamed(request, lines(), "text/event-stream")


async def with_pauses(items: AsyncGenerator[Item]) -> AsyncGenerator[Item | None]:
    """``items``, and None whenever none has come for KEEP_ALIVE_SECONDS."""
    async with contextlib.aclosing(items):
        while True:
            coming = asyncio.ensure_future(anext(items))
            try:
                while not (await asyncio.wait({coming}, timeout=KEEP_ALIVE_SECONDS))[0]:
                    yield None
                item = coming.result()
            except StopAsyncIteration:
                return
            finally:
                if coming.cancel():  # this iterator is closed: wait until the other one can be
                    await asyncio.wait({coming})
                if not coming.cancelled():
                    coming.exception()  # or asyncio reports it; nobody reads any more
            yield item


DONE = b"data: [DONE]\n\n"
"""The end of a stream of chat completions."""


def data_line(event: Mapping[str, Any]) -> bytes:
    name = f"event: {event['type']}\n" if "type" in event else ""
    return f"{name}data: {json.dumps(event, ensure_ascii=False)}\n\n".encode()
