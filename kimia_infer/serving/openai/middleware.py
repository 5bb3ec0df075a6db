"""Around every request: who may make it, limits on its body, and its line in the counters."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from starlette.requests import HTTPConnection
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kimia_infer.serving.openai.errors import ApiError, response_to
from kimia_infer.serving.openai.metrics import Meters
from kimia_infer.serving.openai.service import Service

BODY_SECONDS = 60.0
"""Longest pause within a body, before its sender counts as gone."""


class Bodies:
    """Refuses bodies of more than ``megabytes``, and those that stop coming."""

    def __init__(self, app: ASGIApp, megabytes: int):
        self._app, self._limit = app, megabytes * 1_000_000

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        read, complete = 0, False

        async def limited() -> Message:
            nonlocal read, complete
            if complete:  # what comes now is the end of the connection
                return await receive()
            try:
                async with asyncio.timeout(BODY_SECONDS):
                    message = await receive()
            except TimeoutError as error:
                text = f"the body stopped coming for {BODY_SECONDS:g} s"
                raise ApiError(408, text, retry=False) from error
            read += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if read > self._limit:
                text = f"the body has more than {self._limit // 1_000_000} MB, the limit here"
                raise ApiError(413, text, code="body_too_large", headers={"connection": "close"})
            return message

        await self._app(scope, limited, send)


class Admission:
    """Refuses requests to the API that may not be made, before their bodies are read."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1/"):
            try:
                self._service.admit(HTTPConnection(scope))
            except ApiError as error:
                await response_to(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class Counted:
    """Counts requests by status and by which of ``paths``, such as ``/v1/models/{name}``."""

    def __init__(self, app: ASGIApp, meters: Meters, paths: Iterable[str]):
        self._app, self._meters = app, meters
        self._patterns = [(compile_path(path)[0], path) for path in paths]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            found = (path for pattern, path in self._patterns if pattern.match(scope["path"]))
            self._meters.requests.labels(next(found, "none"), status).inc()
