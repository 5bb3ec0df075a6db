"""A client of Cog servers, with only the standard library.

Asks a server for a prediction, whole or streamed, and reads what comes back. A prediction is what
the server or a hosted API returns (``{"status", "output", ...}``) or what ``cog predict`` prints,
the output alone. Its audio is a data URI, or a URL where the host uploads files.
"""

from __future__ import annotations

import base64
import http.client
import io
import ipaddress
import json
import mimetypes
import re
import time
import urllib.error
import urllib.parse
import urllib.request
import wave
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Event = tuple[str, dict[str, Any]]
"""Name and data of a server-sent event."""

RETRY_SECONDS = 1.0
DOWNLOAD_SECONDS = 60

PCM_RATE, PCM_BYTES = 24_000, 2
"""Samples per second and bytes per sample of all speech (published configuration)."""


class PredictionError(RuntimeError):
    """The server cannot be reached, refused or failed, or its answer cannot be read."""


@dataclass(frozen=True)
class Prediction:
    """The text, the bytes of the audio file (None without speech) and the metrics.

    ``audio_reason`` explains why requested speech is missing, ``notes`` list anything else that
    is unusual.
    """

    text: str
    audio: bytes | None
    metrics: dict[str, Any]
    audio_reason: str | None = None
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Chunk:
    """A piece of a streamed prediction: text, or mono 16-bit samples at 24 kHz, or both."""

    text: str
    pcm: bytes


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
) -> Prediction:
    """Send ``inputs`` to a Cog server and wait for its prediction.

    ``url`` is the server's address, or the full address of a ``/predictions`` route;
    ``token`` goes into the Authorization header. A server that is still loading or busy is
    asked again until ``timeout`` seconds are over.

    Raises:
        PredictionError: not reachable, not ready in time, refused, failed or unreadable.
    """
    address = _address(url)
    with _open(address, inputs, "application/json", token, timeout, report) as response:
        try:
            return parse_prediction(response.read())
        except (OSError, http.client.HTTPException) as error:
            raise PredictionError(f"{address}: the connection broke ({error})") from error
        except PredictionError as error:
            raise PredictionError(f"{address}: {error}") from error


def stream_prediction(
    url: str,
    inputs: Mapping[str, Any],
    *,
    token: str | None = None,
    timeout: float = 600.0,
    report: Callable[[str], None] = lambda message: None,
) -> Iterator[Chunk | Prediction]:
    """:func:`post_prediction` as it happens: chunks, and last the whole prediction.

    The server must serve a streaming predictor. Closing the iterator closes the connection,
    on which the server cancels the prediction. ``timeout`` also limits the wait for each chunk.

    Raises:
        PredictionError: as above, or the stream breaks off.
    """
    address = _address(url)
    with _open(address, inputs, "text/event-stream", token, timeout, report) as response:
        yield from read_stream(_events(address, response))


def _events(address: str, response: http.client.HTTPResponse) -> Iterator[Event]:
    """The server-sent events of a prediction, up to ``completed``."""
    try:
        for name, data in parse_events(response):
            if name == "error":
                raise PredictionError(f"{address}: {data.get('error') or 'the stream failed'}")
            yield name, data
            if name == "completed":
                return
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise PredictionError(f"{address}: the stream broke ({error})") from error
    raise PredictionError(f"{address}: the stream ended before the answer did")


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
                    raise ValueError(f"event {name} is not a JSON object")
                yield name, document
            name, data = "message", []


def open_url(request: str | urllib.request.Request, timeout: float) -> http.client.HTTPResponse:
    """``urllib.request.urlopen``, but this machine itself is reached directly, without a proxy.

    Proxies of the environment cannot reach a server that listens on this machine alone.
    """
    url = request if isinstance(request, str) else request.full_url
    handlers = [urllib.request.ProxyHandler({})] if is_loopback(url) else []
    return urllib.request.build_opener(*handlers).open(request, timeout=timeout)


def is_loopback(url: str) -> bool:
    """Whether the host of ``url`` is this machine."""
    try:
        host = (urllib.parse.urlsplit(url).hostname or "").removesuffix(".")
        if host == "localhost" or host.endswith(".localhost"):
            return True
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


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
        late = PredictionError(f"{address}: no answer within {timeout:g} s{waiting}")
        if left <= 0:
            raise late
        request = urllib.request.Request(address, body, headers)
        if token:
            # Not sent along where the server redirects to.
            request.add_unredirected_header("Authorization", f"Bearer {token}")
        try:
            return open_url(request, timeout=left)
        except urllib.error.HTTPError as error:
            reason = _reason(error)
            if error.code == 406:
                reason += "; start the server with --stream"
            if error.code not in (409, 503):
                raise PredictionError(f"{address}: HTTP {error.code}: {reason}") from error
            _check_alive(address)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise late from error
            raise PredictionError(f"{address}: cannot be reached ({reason})") from error
        if not waiting:
            report(f"waiting for {address}: {reason}")
        waiting = f" (last: {reason})"
        time.sleep(min(RETRY_SECONDS, max(deadline - time.monotonic(), 0)))


def _reason(error: urllib.error.HTTPError) -> str:
    """The reason for a refusal; one entry per input where inputs are out of range."""
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
    """Raise if a server that takes no request never will: it does not end by itself."""
    health = address.removesuffix("/predictions") + "/health-check"
    try:
        with open_url(health, timeout=10) as response:
            state = json.load(response)
    except (OSError, ValueError):
        return
    status = state.get("status") if isinstance(state, dict) else None
    if status in ("SETUP_FAILED", "DEFUNCT", "UNHEALTHY"):
        raise PredictionError(
            f"{address}: the server will not become ready, its status is {status}"
        )


def read_stream(events: Iterable[Event]) -> Iterator[Chunk | Prediction]:
    """The chunks of a streamed prediction as its events arrive, and last the whole Prediction.

    Raises:
        PredictionError: a failed prediction, or a chunk that cannot be read.
    """
    text, pcm = [], []
    last: Any = {}
    for name, data in events:
        if name == "output":
            last = data.get("chunk")
            chunk = _chunk(last)
            text.append(chunk.text)
            pcm.append(chunk.pcm)
            yield chunk
        elif name == "completed":
            _check_status(data)
            samples = b"".join(pcm)
            yield Prediction(
                "".join(text),
                _wav(samples) if samples else None,
                data.get("metrics") or {},
                last.get("audio_reason"),
                last.get("notes") or (),
            )


def _chunk(output: Any) -> Chunk:
    if not isinstance(output, dict) or not isinstance(text := output.get("text") or "", str):
        raise PredictionError("a chunk has no text; is this an answer of Kimi-Audio?")
    audio = output.get("audio")
    return Chunk(text, b"" if audio is None else _pcm(read_reference(audio)))


def _pcm(content: bytes) -> bytes:
    try:
        with wave.open(io.BytesIO(content)) as reader:
            form = (reader.getnchannels(), reader.getsampwidth(), reader.getframerate())
            samples = reader.readframes(reader.getnframes())
    except (wave.Error, EOFError) as error:
        raise PredictionError(f"audio: a chunk is not a wav file ({error})") from error
    if form != (1, PCM_BYTES, PCM_RATE):
        raise PredictionError(f"audio: expected mono, 2 bytes, {PCM_RATE} Hz, found {form}")
    return samples


def _wav(samples: bytes) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(PCM_BYTES)
        writer.setframerate(PCM_RATE)
        writer.writeframes(samples)
    return file.getvalue()


def parse_prediction(document: str | bytes | dict[str, Any]) -> Prediction:
    """Read a Cog prediction, given as JSON or decoded; a URL in it is downloaded.

    Raises:
        PredictionError: no prediction, a failed or unfinished one, unreadable audio.
    """
    if not isinstance(document, dict):
        try:
            document = json.loads(document)
        except ValueError as error:
            raise PredictionError(f"not JSON ({error})") from error
    if not isinstance(document, dict):
        raise PredictionError("expected a JSON object: a Cog prediction, or its output alone")
    _check_status(document)
    output = document.get("output", document)
    if not isinstance(output, dict) or not isinstance(output.get("text"), str):
        raise PredictionError("the output has no text; is this an answer of Kimi-Audio?")
    audio = output.get("audio")
    return Prediction(
        output["text"],
        None if audio is None else read_reference(audio),
        document.get("metrics") or {},
        output.get("audio_reason"),
        output.get("notes") or (),
    )


def _check_status(document: dict[str, Any]) -> None:
    status = document.get("status", "succeeded")
    if status == "succeeded":
        return
    if status in ("starting", "processing"):
        raise PredictionError(
            f"the prediction is not finished (status {status}); fetch it again later"
        )
    # Cog puts the first of these before every error, and one of the others after it.
    reason = re.sub(
        r"^(Prediction failed: |Async prediction failed: |Generator iteration error: )+",
        "",
        str(document.get("error") or ""),
    )
    raise PredictionError(f"the prediction ended as {status}: {reason or 'no reason'}")


def read_reference(reference: Any) -> bytes:
    """The bytes behind a data URI or an http(s) URL; other schemes are refused."""
    scheme, shown = str(reference).partition(":")[0].lower(), repr(reference)[:60]
    if not isinstance(reference, str) or scheme not in ("data", "http", "https"):
        raise PredictionError(f"audio: expected a data URI or an http(s) URL, found {shown}")
    header, _, data = reference.partition(",")
    try:
        if header.endswith(";base64"):
            content = base64.b64decode(data, validate=True)  # urllib ignores wrong characters
        else:
            with open_url(reference, timeout=DOWNLOAD_SECONDS) as response:
                content = response.read()
    except (OSError, ValueError) as error:
        raise PredictionError(f"audio: {shown} cannot be read ({error})") from error
    if not content:
        raise PredictionError("audio: the file is empty")
    return content
