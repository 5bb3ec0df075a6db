"""``transcribe --url``: recordings written down by a server with OpenAI's interface."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from kimia_infer.api.request import Deadline
from kimia_infer.commands.main import run_command
from kimia_infer.serving.transcripts import TranscriptServer
from kimia_infer.utils.errors import RequestCancelled, RequestError
from tests.serving.helpers import Server
from tests.serving.questions import QUESTION

WORDS = "what is four plus five"
MODELS = (200, b'{"data": [{"id": "hearing"}]}')
EVENTS = [
    {"type": "transcript.text.delta", "delta": "hello"},
    {"type": "transcript.text.segment", "start": 0.5, "end": 1.5, "text": "hello"},
    {"type": "transcript.text.done", "text": "hello"},
]


def stream(*events: dict) -> bytes:
    return b"".join(f"data: {json.dumps(event)}\n\n".encode() for event in events)


@contextlib.contextmanager
def scripted(*script: tuple[int, bytes]) -> Iterator[str]:
    """The URL of a server that gives these answers, status and body, one after another."""
    left = iter(script)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, body = next(left)
            self.send_response(status)
            self.send_header("retry-after-ms", "1")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def transcribe(server: Server, *arguments: str | Path) -> int:
    given = ["--url", server.url, *map(str, arguments)]
    return run_command("transcribe", given, "kimi-audio transcribe")


def test_files_are_written_by_a_server(
    front: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(QUESTION, tmp_path / "first.wav")
    (tmp_path / "broken.mp3").write_bytes(b"no sound")
    assert transcribe(front, tmp_path, "--format", "srt", "--language", "en") == 1
    printed = capsys.readouterr()
    assert printed.out == f"{tmp_path / 'first.srt'}\n"
    assert f"{tmp_path / 'broken.mp3'}: not readable as sound" in printed.err
    assert (tmp_path / "first.srt").read_text() == f"1\n00:00:00,100 --> 00:00:01,850\n{WORDS}\n"
    assert transcribe(front, tmp_path / "first.wav", "--format", "json") == 0
    found = json.loads((tmp_path / "first.json").read_text())
    assert found["text"] == WORDS and found["duration"] == pytest.approx(1.97, abs=0.01)
    assert transcribe(front, tmp_path / "first.wav", "--prompt", "Sums.") == 0
    assert (tmp_path / "first.txt").read_text() == f"{WORDS}\n"


def test_a_model_has_no_settings_on_a_server(
    front: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        transcribe(front, QUESTION, "--slots", "2")
    assert "--slots has no effect with --url" in capsys.readouterr().err


def test_a_busy_server_is_asked_again(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"sound")
    seconds: list[float] = []
    with scripted(MODELS, (429, b"{}"), (429, b"{}"), (200, stream(*EVENTS))) as url:
        asked = TranscriptServer(f"{url}/v1/")
        found = asked.transcribe(tmp_path / "a.wav", {}, Deadline(None), seconds.append)
    assert found.text == "hello" and seconds == [1.5]
    assert [(s.start, s.end, s.text) for s in found.segments] == [(0.5, 1.5, "hello")]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (stream(*EVENTS[:2]), 200, "ended before the transcript"),
        (stream({"error": {"message": "file: too long"}}), 200, "^too long$"),
        (b"data: {\n\n", 200, "the stream broke"),
        (stream({"type": "transcript.text.segment"}), 200, "the stream broke"),
        (b'{"error": {"message": "prompt: too long"}}', 400, "^prompt: too long$"),
        (b"<html>", 502, "HTTP 502"),
        (b"[]", 500, r"the server answered \[\]"),
    ],
)
def test_what_a_server_does_wrong_is_said(
    tmp_path: Path, body: bytes, status: int, message: str
) -> None:
    (tmp_path / "a.wav").write_bytes(b"sound")
    with scripted(MODELS, (status, body)) as url:
        asked = TranscriptServer(url)
        with pytest.raises(RequestError, match=message):
            asked.transcribe(tmp_path / "a.wav", {}, Deadline(None), lambda done: None)


def test_other_servers_are_no_servers_of_transcripts() -> None:
    for body in (b"{}", b"hello", b'{"data": []}'):
        with scripted((200, body)) as url, pytest.raises(RequestError, match="OpenAI's interface"):
            TranscriptServer(url)
    with pytest.raises(RequestError, match="cannot be reached"):
        TranscriptServer("http://127.0.0.1:1")
    with scripted((429, b"{}")) as url, pytest.raises(RequestError, match=r"again in 0.001 s"):
        TranscriptServer(url)


def test_who_interrupts_is_heard(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"sound")
    deadline = Deadline(None)
    deadline.cancel()
    with scripted(MODELS, (200, stream(*EVENTS))) as url:
        asked = TranscriptServer(url)
        with pytest.raises(RequestCancelled):
            asked.transcribe(tmp_path / "a.wav", {}, deadline, lambda done: None)
