"""Saved Cog answers to transcript and sound."""

from __future__ import annotations

import base64
import functools
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kimia_infer.service.answer import AnswerError, parse_answer

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
        answer = parse_answer(form)
        assert (answer.text, answer.audio) == ("At ten.", SOUND)
        assert answer.metrics == document.get("metrics", {})


def test_answer_without_speech() -> None:
    assert parse_answer({"output": {"audio": None, "text": "Hi"}}).audio is None
    assert parse_answer({"text": ""}).text == ""


def test_data_uri_without_base64() -> None:
    assert parse_answer({"text": "", "audio": "data:,a%20b"}).audio == b"a b"


def test_sound_behind_a_url_is_downloaded(file_server: str) -> None:
    assert parse_answer({"text": "", "audio": f"{file_server}/sound.wav"}).audio == SOUND
    with pytest.raises(AnswerError, match=r"other\.wav cannot be downloaded .*404"):
        parse_answer({"text": "", "audio": f"{file_server}/other.wav"})


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (b"\xff", "not JSON"),
        ("", "not JSON"),
        ("[]", "expected a JSON object"),
        ({}, "no output with a text"),
        ({"output": None, "status": "succeeded"}, "no output with a text"),
        ({"output": ["a", "b"]}, "no output with a text"),
        ({"output": {"audio": URI}}, "no output with a text"),
        ({"status": "failed", "error": "too long"}, "ended as failed: too long"),
        ({"status": "canceled", "output": OUTPUT}, "ended as canceled"),
        ({"status": "processing"}, "has not ended"),
        ({"text": "", "audio": "data:audio/wav;base64,@@@@"}, "damaged data URI"),
        ({"text": "", "audio": "data:audio/wav;base64,AAA"}, "damaged data URI"),
        ({"text": "", "audio": "data:audio/wav"}, "without data"),
        ({"text": "", "audio": "data:audio/wav;base64,"}, "empty"),
        ({"text": "", "audio": "/tmp/answer.wav"}, "expected a data URI"),
        ({"text": "", "audio": f"file://{Path(__file__)}"}, "expected a data URI"),
        ({"text": "", "audio": 3}, "expected a data URI"),
        ({"text": "", "audio": "http://127.0.0.1:1/a.wav"}, "cannot be downloaded"),
    ],
    ids=str,
)
def test_what_is_no_answer_is_refused(document, message: str) -> None:
    with pytest.raises(AnswerError, match=message):
        parse_answer(document)
