"""Cog predictions, saved or streamed, to text and audio."""

from __future__ import annotations

import base64
import functools
import http.server
import io
import json
import threading
import wave
from collections.abc import Iterator
from pathlib import Path

import pytest

from kimia_infer.serving.client import (
    Chunk,
    Prediction,
    PredictionError,
    parse_prediction,
    read_stream,
)

SOUND = bytes(range(256))
URI = "data:audio/x-wav;base64," + base64.b64encode(SOUND).decode()
OUTPUT = {"audio": URI, "text": "At ten."}


@pytest.fixture(scope="module")
def file_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("files")
    (directory / "sound.wav").write_bytes(SOUND)
    handler = functools.partial(Quiet, directory=str(directory))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments) -> None:
        return


@pytest.mark.parametrize(
    "document",
    [
        OUTPUT,
        {"status": "succeeded", "output": OUTPUT, "metrics": {"seed": 3}},
        {"id": "abc", "status": "succeeded", "output": OUTPUT, "urls": {"get": "https://x"}},
    ],
    ids=["cog predict", "server", "hosted"],
)
def test_every_shape_of_answer_is_read(document: dict) -> None:
    for form in (document, json.dumps(document), json.dumps(document, indent=2).encode()):
        answer = parse_prediction(form)
        assert (answer.text, answer.audio) == ("At ten.", SOUND)
        assert answer.metrics == document.get("metrics", {})


def test_answer_without_speech() -> None:
    assert parse_prediction({"output": {"audio": None, "text": "Hi"}}).audio is None
    assert parse_prediction({"text": ""}).text == ""


def test_data_uri_without_base64() -> None:
    assert parse_prediction({"text": "", "audio": "data:,a%20b"}).audio == b"a b"


def test_sound_behind_a_url_is_downloaded(file_server: str) -> None:
    assert parse_prediction({"text": "", "audio": f"{file_server}/sound.wav"}).audio == SOUND
    with pytest.raises(PredictionError, match=r"other\.wav' cannot be read .*404"):
        parse_prediction({"text": "", "audio": f"{file_server}/other.wav"})


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (b"\xff", "not JSON"),
        ("", "not JSON"),
        ("[]", "expected a JSON object"),
        ({}, "output has no text"),
        ({"output": None, "status": "succeeded"}, "output has no text"),
        ({"output": ["a", "b"]}, "output has no text"),
        ({"output": {"audio": URI}}, "output has no text"),
        ({"status": "failed", "error": "too long"}, "ended as failed: too long"),
        ({"status": "canceled", "output": OUTPUT}, "ended as canceled"),
        ({"status": "processing"}, "is not finished"),
        ({"text": "", "audio": "data:audio/wav;base64,@@@@"}, "empty"),
        ({"text": "", "audio": "data:audio/wav;base64,AAA"}, "cannot be read"),
        ({"text": "", "audio": "data:audio/wav"}, "cannot be read"),
        ({"text": "", "audio": "data:audio/wav;base64,"}, "empty"),
        ({"text": "", "audio": "/tmp/answer.wav"}, "expected a data URI"),
        ({"text": "", "audio": f"file://{Path(__file__)}"}, "expected a data URI"),
        ({"text": "", "audio": 3}, "expected a data URI"),
        ({"text": "", "audio": "http://127.0.0.1:1/a.wav"}, "cannot be read"),
    ],
    ids=str,
)
def test_what_is_no_answer_is_refused(document, message: str) -> None:
    with pytest.raises(PredictionError, match=message):
        parse_prediction(document)


def sound(samples: bytes, rate: int = 24_000, channels: int = 1) -> str:
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(channels)
        writer.setsampwidth(2)
        writer.setframerate(rate)
        writer.writeframes(samples)
    return "data:audio/wav;base64," + base64.b64encode(file.getvalue()).decode()


def output(**chunk) -> tuple[str, dict]:
    return "output", {"index": 0, "chunk": chunk}


DONE = ("completed", {"status": "succeeded", "metrics": {"seed": 3}})


def test_chunks_become_the_prediction() -> None:
    events = [
        ("start", {}),
        output(text="At ", audio=None),
        ("metric", {"name": "seed"}),
        output(text=None, audio=sound(b"abcd")),
        output(text="ten."),
        output(audio=sound(b"ef")),
        output(notes=["a note"], audio_reason="a reason"),
        DONE,
    ]
    *chunks, answer = read_stream(events)
    text, first, more, second, last = chunks
    assert (text, more) == (Chunk("At ", b""), Chunk("ten.", b""))
    assert (first, second, last) == (Chunk("", b"abcd"), Chunk("", b"ef"), Chunk("", b""))
    with wave.open(io.BytesIO(answer.audio)) as reader:
        assert reader.readframes(9) == b"abcdef" and reader.getframerate() == 24_000
    assert (answer.text, answer.metrics) == ("At ten.", {"seed": 3})
    assert (answer.notes, answer.audio_reason) == (["a note"], "a reason")


def test_stream_without_speech() -> None:
    assert list(read_stream([DONE])) == [Prediction("", None, {"seed": 3})]


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (("completed", {"status": "failed", "error": "too hot"}), "ended as failed: too hot"),
        (("completed", {"status": "canceled"}), "ended as canceled"),
        (("output", {"chunk": "text"}), "is this an answer of Kimi-Audio"),
        (output(text=3), "is this an answer of Kimi-Audio"),
        (output(audio="data:audio/wav;base64,AAAA"), "not a wav file"),
        (output(audio=sound(b"abcd", rate=16_000)), r"found \(1, 2, 16000\)"),
        (output(audio=sound(b"abcd", channels=2)), r"found \(2, 2, 24000\)"),
        (output(audio="/etc/passwd"), "expected a data URI"),
    ],
    ids=str,
)
def test_stream_that_cannot_be_read_is_refused(event: tuple, message: str) -> None:
    with pytest.raises(PredictionError, match=message):
        list(read_stream([output(text="At "), event]))


def test_notes_of_a_whole_answer_are_read() -> None:
    document = {"text": "", "audio": None, "notes": ["a"], "audio_reason": "b", "segments": None}
    answer = parse_prediction(document)
    assert (answer.notes, answer.audio_reason) == (["a"], "b")
