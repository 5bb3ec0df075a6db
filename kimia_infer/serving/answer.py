"""Cog answers to transcript and sound, wherever they were saved.

An answer is what the server or a hosted API returns (``{"status", "output", ...}``) or what
``cog predict`` prints, the output alone. Its sound is a data URI, or a URL where the host
uploads files.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import urllib.error
import urllib.parse
import urllib.request
import wave
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

DOWNLOAD_SECONDS = 60

PCM_RATE, PCM_BYTES = 24_000, 2
"""Samples per second and bytes per sample of all speech (published configuration)."""


class AnswerError(ValueError):
    """There is no answer in it; the message says why."""


@dataclass(frozen=True)
class Answer:
    """A transcript, the bytes of the sound file (None without speech) and the metrics.

    ``audio_reason`` says why speech that was asked for is missing, ``notes`` what else is not
    as hoped for.
    """

    text: str
    audio: bytes | None
    metrics: dict[str, Any]
    audio_reason: str | None = None
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Piece:
    """What a streamed answer grew by: text, or mono 16-bit samples at 24 kHz, or both."""

    text: str
    pcm: bytes


def read_stream(events: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[Piece | Answer]:
    """The pieces of a streamed prediction as its events come, and last the whole Answer.

    Raises:
        AnswerError: a failed prediction, or a piece that cannot be read.
    """
    text, pcm, last = [], [], {}
    for name, data in events:
        if name == "output":
            last = data.get("chunk")
            piece = _piece(last)
            text.append(piece.text)
            pcm.append(piece.pcm)
            yield piece
        elif name == "completed":
            _check_status(data)
            samples = b"".join(pcm)
            yield Answer(
                "".join(text),
                _wav(samples) if samples else None,
                data.get("metrics") or {},
                last.get("audio_reason"),
                last.get("notes") or (),
            )


def _piece(chunk: Any) -> Piece:
    if not isinstance(chunk, dict) or not isinstance(text := chunk.get("text") or "", str):
        raise AnswerError("a piece that is no object; is this an answer of Kimi-Audio?")
    audio = chunk.get("audio")
    return Piece(text, b"" if audio is None else _pcm(read_reference(audio)))


def _pcm(content: bytes) -> bytes:
    try:
        with wave.open(io.BytesIO(content)) as reader:
            form = (reader.getnchannels(), reader.getsampwidth(), reader.getframerate())
            samples = reader.readframes(reader.getnframes())
    except (wave.Error, EOFError) as error:
        raise AnswerError(f"audio: a piece is no wav file ({error})") from error
    if form != (1, PCM_BYTES, PCM_RATE):
        raise AnswerError(f"audio: a piece is not mono, 16 bit, {PCM_RATE} Hz but {form}")
    return samples


def _wav(samples: bytes) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(PCM_BYTES)
        writer.setframerate(PCM_RATE)
        writer.writeframes(samples)
    return file.getvalue()


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
    return Answer(
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
