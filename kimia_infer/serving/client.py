"""A prediction asked of a Cog server, whole or streamed, with only the standard library."""

from __future__ import annotations

import base64
import http.client
import json
import mimetypes
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

Event = tuple[str, dict[str, Any]]
"""Name and data of a server-sent event."""

RETRY_SECONDS = 1.0


class ServerError(RuntimeError):
    """The server cannot be reached or refuses the request; the message says why."""


def data_uri(path: Path) -> str:
    """The content of a file as a data URI; the type is guessed from its name."""
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def post_prediction(
    url: str,
    inputs: Mapping[str, Any],
    *,
    token: str | None = None,
    timeout: float = 600.0,
    report: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Send ``inputs`` to a Cog server and wait for its answer, which is returned decoded.

    ``url`` is the server's address, or the full address of a ``/predictions`` route;
    ``token`` goes into the Authorization header. A server that is still loading or busy is
    asked again until ``timeout`` seconds are over.

    Raises:
        ServerError: not reachable, not ready in time, or the request is refused.
    """
    address = _address(url)
    with _open(address, inputs, "application/json", token, timeout, report) as response:
        try:
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"{address}: the connection broke ({error})") from error
    return _decode(address, content)


def stream_prediction(
    url: str,
    inputs: Mapping[str, Any],
    *,
    token: str | None = None,
    timeout: float = 600.0,
    report: Callable[[str], None] = lambda message: None,
) -> Iterator[Event]:
    """:func:`post_prediction` as it happens: the server-sent events up to ``completed``.

    The server must serve a streaming predictor. Closing the iterator closes the connection,
    on which the server cancels the prediction. ``timeout`` also limits the wait for each event.

    Raises:
        ServerError: as above, or the stream breaks off.
    """
    address = _address(url)
    with _open(address, inputs, "text/event-stream", token, timeout, report) as response:
        try:
            for name, data in parse_events(response):
                if name == "error":
                    raise ServerError(f"{address}: {data.get('error') or 'the stream failed'}")
                yield name, data
                if name == "completed":
                    return
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ServerError(f"{address}: the stream broke ({error})") from error
    raise ServerError(f"{address}: the stream ended before the answer did")


def parse_events(lines: Iterable[bytes]) -> Iterator[Event]:
    """Server-sent events with JSON data from the lines of a response; ValueError for others."""
    name, data = "message", []
    for line in lines:
        field, _, value = line.decode().rstrip("\r\n").partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            name = value
        elif field == "data":
            data.append(value)
        elif not field and not value:  # the empty line that ends an event, and no comment
            if data:
                document = json.loads("\n".join(data))
                if not isinstance(document, dict):
                    raise ValueError(f"event {name} holds no object")
                yield name, document
            name, data = "message", []


def _address(url: str) -> str:
    base = url.rstrip("/")
    return base if base.endswith("/predictions") else f"{base}/predictions"


def _open(
    address: str,
    inputs: Mapping[str, Any],
    accept: str,
    token: str | None,
    timeout: float,
    report: Callable[[str], None],
) -> http.client.HTTPResponse:
    """The response to an accepted request, of which nothing has been read."""
    deadline = time.monotonic() + timeout
    body = json.dumps({"input": inputs}).encode()
    headers = {"Content-Type": "application/json", "Accept": accept}
    waiting = ""
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise ServerError(f"{address}: no answer within {timeout:g} s{waiting}")
        request = urllib.request.Request(address, body, headers)
        if token:
            # Not sent along where the server redirects to.
            request.add_unredirected_header("Authorization", f"Bearer {token}")
        try:
            return urllib.request.urlopen(request, timeout=left)
        except urllib.error.HTTPError as error:
            reason = _reason(error)
            if error.code not in (409, 503):
                raise ServerError(f"{address}: HTTP {error.code}: {reason}") from error
            if error.code == 503:
                _check_alive(address)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise ServerError(f"{address}: cannot be reached ({reason})") from error
        if not waiting:
            report(f"waiting for {address}: {reason}")
        waiting = f" (last: {reason})"
        time.sleep(min(RETRY_SECONDS, max(deadline - time.monotonic(), 0)))


def _decode(address: str, content: bytes) -> dict[str, Any]:
    try:
        document = json.loads(content)
    except ValueError as error:
        raise ServerError(f"{address}: the answer is not JSON; is this a Cog server?") from error
    if not isinstance(document, dict):
        raise ServerError(f"{address}: the answer is no object; is this a Cog server?")
    return document


def _reason(error: urllib.error.HTTPError) -> str:
    """What a refusal says: one line per input where inputs are out of range."""
    content = error.read().decode(errors="replace")
    try:
        document = json.loads(content)
        detail = document.get("detail") or document.get("error") or content
        if isinstance(detail, list):
            return "; ".join(f"{entry['loc'][-1]}: {entry['msg']}" for entry in detail)
        return str(detail)
    except (ValueError, AttributeError, KeyError, IndexError, TypeError):
        return content.strip()[:500] or error.reason


def _check_alive(address: str) -> None:
    """Raise if a server that answers 503 will never be ready: it does not end by itself."""
    health = address.removesuffix("/predictions") + "/health-check"
    try:
        with urllib.request.urlopen(health, timeout=10) as response:
            state = json.load(response)
    except (OSError, ValueError):
        return
    status = state.get("status") if isinstance(state, dict) else None
    if status in ("SETUP_FAILED", "DEFUNCT", "UNHEALTHY"):
        raise ServerError(f"{address}: the server will not become ready, its status is {status}")
