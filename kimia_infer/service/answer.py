"""Cog answers to transcript and sound, wherever they were saved.

An answer is what the server or a hosted API returns (``{"status", "output", ...}``) or what
``cog predict`` prints, the output alone. Its sound is a data URI, or a URL where the host
uploads files.
"""

from __future__ import annotations

import base64
import binascii
import json
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import Any

DOWNLOAD_SECONDS = 60


class AnswerError(ValueError):
    """There is no answer in it; the message says why."""


@dataclass(frozen=True)
class Answer:
    """A transcript, the bytes of the sound file (None without speech) and the metrics."""

    text: str
    audio: bytes | None
    metrics: dict[str, Any]


def parse_answer(document: str | bytes | dict[str, Any]) -> Answer:
    """Read a Cog answer, given as JSON or decoded; a URL in it is downloaded.

    Raises:
        AnswerError: not an answer, a failed or unfinished prediction, unreadable sound.
    """
    if not isinstance(document, dict):
        try:
            document = json.loads(document)
        except ValueError as error:
            raise AnswerError(f"not JSON ({error})") from error
    if not isinstance(document, dict):
        raise AnswerError("expected a JSON object: a Cog answer, or its output alone")
    _check_status(document)
    output = document.get("output", document)
    if not isinstance(output, dict) or not isinstance(output.get("text"), str):
        raise AnswerError("no output with a text in it; is this an answer of Kimi-Audio?")
    audio = output.get("audio")
    metrics = document.get("metrics")
    return Answer(
        output["text"],
        None if audio is None else read_reference(audio),
        metrics if isinstance(metrics, dict) else {},
    )


def _check_status(document: dict[str, Any]) -> None:
    status = document.get("status", "succeeded")
    if status == "succeeded":
        return
    if status in ("starting", "processing"):
        raise AnswerError(f"the prediction has not ended (status {status}); fetch it again later")
    raise AnswerError(f"the prediction ended as {status}: {document.get('error') or 'no reason'}")


def read_reference(reference: Any) -> bytes:
    """The bytes behind a data URI or an http(s) URL; other schemes are refused."""
    scheme = str(reference).partition(":")[0].lower()
    if not isinstance(reference, str) or scheme not in ("data", "http", "https"):
        shown = repr(reference)[:60]
        raise AnswerError(f"audio: expected a data URI or an http(s) URL, found {shown}")
    content = _decode(reference) if scheme == "data" else _download(reference)
    if not content:
        raise AnswerError("audio: the file is empty")
    return content


def _decode(uri: str) -> bytes:
    header, comma, data = uri.partition(",")
    if not comma:
        raise AnswerError("audio: data URI without data")
    if not header.endswith(";base64"):
        return urllib.parse.unquote_to_bytes(data)
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise AnswerError(f"audio: damaged data URI ({error})") from error


def _download(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=DOWNLOAD_SECONDS) as response:
            return response.read()
    except (OSError, urllib.error.URLError, ValueError) as error:
        raise AnswerError(f"audio: {url} cannot be downloaded ({error})") from error
