"""Transcripts from a server with OpenAI's interface, such as ``kimi-audio serve``."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kimia_infer.api.request import Deadline
from kimia_infer.api.transcription import Transcript, TranscriptSegment
from kimia_infer.serving.client import open_url, parse_events
from kimia_infer.utils.errors import RequestError

PATIENCE_SECONDS = 600.0
"""Longest time without any event."""

BLOCK = 2**20


class TranscriptServer:
    """A server at ``url``, with or without ``/v1``; ``token`` is a key of it.

    Raises RequestError if it cannot be reached, or refuses the key.
    """

    def __init__(self, url: str, token: str | None = None):
        self._base, self._token = url.rstrip("/").removesuffix("/v1") + "/v1", token
        with self._open("/models") as response:
            try:
                self._model = json.load(response)["data"][0]["id"]
            except (ValueError, LookupError, TypeError) as error:
                raise RequestError(f"{self._base}: no server with OpenAI's interface") from error

    def transcribe(
        self,
        path: Path,
        fields: Mapping[str, str],
        deadline: Deadline,
        on_progress: Callable[[float], None],
    ) -> Transcript:
        """The transcript of a file with segments, asked for with ``fields`` of the API.

        ``on_progress`` is called with the seconds that are done. Raises RequestError for what the
        server refuses, and what ``deadline`` raises.
        """
        given = {"model": self._model, "response_format": "verbose_json", "stream": "true"}
        while True:
            try:
                with self._open("/audio/transcriptions", Form({**given, **fields}, path)) as events:
                    return self._read(events, deadline, on_progress)
            except Busy as busy:
                deadline.check()
                time.sleep(busy.seconds)
            except RequestError:
                raise
            except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
                raise RequestError(f"{self._base}: the stream broke ({error})") from error

    def _read(
        self,
        response: http.client.HTTPResponse,
        deadline: Deadline,
        on_progress: Callable[[float], None],
    ) -> Transcript:
        segments: list[TranscriptSegment] = []
        for _, event in parse_events(response):
            deadline.check()
            match event.get("type"):
                case "transcript.text.segment":
                    start, end = event["start"], event["end"]
                    segments.append(TranscriptSegment(start, end, event["text"]))
                    on_progress(end)
                case "transcript.text.done":
                    own = event.get("kimi_audio", {})  # other servers have no such field
                    metrics = {"input_audio_seconds": own.get("input_audio_seconds")}
                    return Transcript(event["text"], segments, metrics, own.get("notes", []))
                case None:
                    raise RequestError(_message(event))
        raise RequestError(f"{self._base}: the stream ended before the transcript")

    def _open(self, path: str, form: Form | None = None) -> http.client.HTTPResponse:
        request = urllib.request.Request(self._base + path)
        if form is not None:
            request.data = form  # type: ignore[assignment]
            request.add_header("Content-Type", f"multipart/form-data; boundary={form.boundary}")
            request.add_header("Content-Length", str(form.size))
        if self._token:
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        try:
            return open_url(request, PATIENCE_SECONDS)
        except urllib.error.HTTPError as error:
            if error.code == 429:
                raise Busy(float(error.headers.get("retry-after-ms", 1000)) / 1000) from error
            try:
                message = _message(json.load(error))
            except ValueError:
                message = f"HTTP {error.code}"
            raise RequestError(message) from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            text = f"cannot be reached ({reason})"
            if form is not None and isinstance(reason, BrokenPipeError | ConnectionResetError):
                text = f"the server stopped taking the file ({reason}); it may be too large for it"
            raise RequestError(f"{self._base}: {text}") from error


class Busy(RequestError):
    """The server takes no further request for ``seconds``."""

    def __init__(self, seconds: float):
        super().__init__(f"the server is busy; try again in {seconds:g} s")
        self.seconds = seconds


class Form:
    """The body of a request with ``fields`` and a file, which is read while it is sent."""

    def __init__(self, fields: Mapping[str, str], path: Path):
        self.boundary, self._path = uuid.uuid4().hex, path
        parts = [
            f'--{self.boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
            for name, value in fields.items()
        ]
        suffix = path.suffix if path.suffix.isascii() else ""
        parts.append(
            f'--{self.boundary}\r\nContent-Disposition: form-data; name="file"; '
            f'filename="recording{suffix}"\r\nContent-Type: application/octet-stream\r\n\r\n'
        )
        self._head, self._tail = "".join(parts).encode(), f"\r\n--{self.boundary}--\r\n".encode()
        self.size = len(self._head) + path.stat().st_size + len(self._tail)

    def __iter__(self) -> Iterator[bytes]:
        yield self._head
        with self._path.open("rb") as file:
            while block := file.read(BLOCK):
                yield block
        yield self._tail


def _message(document: Any) -> str:
    """The reason in an error of the API."""
    try:
        return str(document["error"]["message"]).removeprefix("file: ")
    except (LookupError, TypeError):
        return f"the server answered {json.dumps(document)[:200]}"
