"""Streams of events while nothing is to be said, read by OpenAI's client."""

from __future__ import annotations

import asyncio
import gc
import re
import threading
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import httpx
import openai
import pytest
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from kimia_infer.serving.openai import streams
from kimia_infer.utils.errors import RequestError
from tests.serving.applications import serving
from tests.serving.helpers import PATIENCE

DELTA = {"type": "transcript.text.delta", "delta": "nine"}


class Script:
    """Streams an event after each pause of two comments, or raises ``failure`` after the first.

    ``goes_on`` False ends no pause. ``closed`` is set once nobody reads the events any more.
    """

    def __init__(self) -> None:
        self.failure: str | None = None
        self.goes_on = True
        self.closed = threading.Event()

    async def pause(self) -> None:
        async with asyncio.timeout(PATIENCE):
            for _ in range(2):
                await self.comments.acquire()
            if not self.goes_on:
                await asyncio.sleep(PATIENCE)

    async def events(self) -> AsyncGenerator[dict[str, Any]]:
        try:
            await self.pause()
            if self.failure is not None:
                raise RequestError(self.failure)
            yield DELTA
            await self.pause()
            yield {"type": "transcript.text.done", "text": "nine"}
        finally:
            self.closed.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.comments = asyncio.Semaphore(0)

        async def counted(message: Message) -> None:
            await send(message)
            if message.get("body") == streams.KEEP_ALIVE:
                self.comments.release()

        request = Request(scope, receive)
        await request.body()
        response = await streams.event_stream(request, self.events(), streams.DONE)
        await response(scope, receive, counted)


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def url(script: Script, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(streams, "KEEP_ALIVE_SECONDS", 0.01)
    with serving(script) as url:
        yield url


def transcribe(url: str) -> Iterator[Any]:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
    file = ("a.wav", b"RIFF")
    yield from client.audio.transcriptions.create(model="any", file=file, stream=True)


def post(url: str) -> Any:
    """The stream as it is on the wire."""
    return httpx.stream("POST", f"{url}/v1/audio/transcriptions", files={"file": b"RIFF"})


def test_pauses_are_filled_with_comments_that_clients_ignore(url: str) -> None:
    assert [event.type for event in transcribe(url)] == [DELTA["type"], "transcript.text.done"]
    with post(url) as response:
        wire = response.read().decode()
    pause, event = r"(: keep-alive\n\n){2,}", r"event: \S+\ndata: \{.*\}\n\n"
    assert re.fullmatch(rf"({pause}{event}){{2}}data: \[DONE\]\n\n", wire)


def test_an_error_after_a_comment_is_an_event(url: str, script: Script) -> None:
    """The status has been sent by then."""
    script.failure = "file: broken"
    with pytest.raises(openai.APIError, match="file: broken") as failure:
        list(transcribe(url))
    assert not isinstance(failure.value, openai.APIStatusError)


def test_whoever_hangs_up_in_a_pause_ends_the_stream(url: str, script: Script) -> None:
    script.goes_on = False
    with post(url) as response:
        assert next(response.iter_lines()) == ": keep-alive"
    assert script.closed.wait(PATIENCE)


def test_an_error_that_nobody_reads_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "KEEP_ALIVE_SECONDS", 0.001)
    reported: list[dict[str, Any]] = []

    async def closed_after_an_error() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, found: reported.append(found))

        async def failing() -> AsyncGenerator[int]:
            try:
                await asyncio.sleep(PATIENCE)
                yield 1
            finally:
                raise ValueError("while it was cancelled")

        found = streams.with_pauses(failing())
        assert await anext(found) is None
        await found.aclose()
        del found
        gc.collect()

    asyncio.run(closed_after_an_error())
    assert reported == []
