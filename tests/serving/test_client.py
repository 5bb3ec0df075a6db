"""The client against a scripted server, and predictions that it reads: whole and streamed."""

from __future__ import annotations

import base64
import http.server
import io
import json
import threading
import wave
from collections.abc import Iterator
from pathlib import Path

import pytest

from kimia_infer.commands import serve_cog
from kimia_infer.serving import client
from kimia_infer.serving.client import (
    Chunk,
    Prediction,
    PredictionError,
    data_uri,
    is_loopback,
    open_url,
    parse_events,
    parse_prediction,
    post_prediction,
    read_reference,
    read_stream,
    stream_prediction,
)
from kimia_infer.serving.cog import probe
from tests.serving.helpers import COG_PREFIX
from tests.serving.web import Web, answers, web

SOUND = bytes(range(256))
URI = "data:audio/x-wav;base64," + base64.b64encode(SOUND).decode()
OUTPUT = {"audio": URI, "text": "At ten."}
BUSY = (409, {"error": "At capacity"})
STARTING = (503, {"error": "Setup has not finished"})
DONE = (200, {"status": "succeeded", "output": {"text": "Hi"}})
ANSWERED = Prediction("Hi", None, {})
REFUSED = (
    422,
    {"detail": [{"loc": ["body", "input", "seed"], "msg": "-1 is less than 0", "type": "x"}]},
)


class Script(http.server.ThreadingHTTPServer):
    """Answers POSTs from a list, remembers them, and reports one health status."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), ScriptHandler)
        self.answers: list[tuple[int, object]] = []
        self.requests: list[tuple[str, str | None, object]] = []
        self.status = "STARTING"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class ScriptHandler(http.server.BaseHTTPRequestHandler):
    server: Script

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, self.headers["Authorization"], body))
        self.reply(*self.server.answers.pop(0))

    def do_GET(self) -> None:
        files = {"/health-check": {"status": self.server.status}, "/sound.wav": SOUND}
        self.reply(200 if self.path in files else 404, files.get(self.path))

    def reply(self, code: int, document: object) -> None:
        content = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments) -> None:
        return


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    monkeypatch.setattr(client, "RETRY_SECONDS", 0.01)
    with Script() as script:
        threading.Thread(target=script.serve_forever, daemon=True).start()
        yield script
        script.shutdown()


def test_inputs_and_token_are_sent(server: Script) -> None:
    server.answers = [DONE, DONE]
    assert post_prediction(server.url + "/", {"text": "Hi"}, token="t0k") == ANSWERED
    post_prediction(f"{server.url}/v1/models/x/predictions", {})
    assert server.requests == [
        ("/predictions", "Bearer t0k", {"input": {"text": "Hi"}}),
        ("/v1/models/x/predictions", None, {"input": {}}),
    ]


def test_busy_or_starting_server_is_asked_again(server: Script) -> None:
    server.answers = [STARTING, BUSY, BUSY, DONE]
    said: list[str] = []
    assert post_prediction(server.url, {}, report=said.append) == ANSWERED
    assert len(server.requests) == 4
    assert len(said) == 1 and "Setup has not finished" in said[0]


def test_waiting_ends(server: Script) -> None:
    server.answers = [BUSY] * 1000
    with pytest.raises(PredictionError, match=r"no answer within 0\.2 s \(last: At capacity\)"):
        post_prediction(server.url, {}, timeout=0.2)


@pytest.mark.parametrize(
    ("answer", "status"),
    [(STARTING, "SETUP_FAILED"), (STARTING, "DEFUNCT"), (BUSY, "UNHEALTHY")],
    ids=["failed", "defunct", "slot lost"],
)
def test_dead_server_is_not_waited_for(server: Script, answer: tuple, status: str) -> None:
    server.answers, server.status = [answer], status
    with pytest.raises(PredictionError, match=f"status is {status}"):
        post_prediction(server.url, {})


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (REFUSED, "HTTP 422: seed: -1 is less than 0"),
        ((413, b"too large"), "HTTP 413: too large"),
        ((500, b""), "HTTP 500"),
        ((422, {"detail": [{"loc": []}]}), "HTTP 422"),
        ((401, {"detail": "Unauthorized"}), "HTTP 401: Unauthorized"),
        ((200, b"<html>"), "not JSON"),
        ((200, [1]), "expected a JSON object"),
    ],
    ids=str,
)
def test_refusal_is_told(server: Script, answer: tuple, message: str) -> None:
    server.answers = [answer]
    with pytest.raises(PredictionError, match=message):
        post_prediction(server.url, {})


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """The only proxy of the environment; it answers everything itself."""
    for name in ("no_proxy", "NO_PROXY", "REQUEST_METHOD"):
        monkeypatch.delenv(name, raising=False)
    with web(answers(b'{"status": "READY"}')) as server:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{server.port}")
        yield server


def test_this_machine_is_asked_without_a_proxy(server: Script, proxy: Web) -> None:
    server.answers = [DONE, STARTING, DONE]
    assert post_prediction(server.url, {}) == ANSWERED
    assert post_prediction(f"http://localhost:{server.server_port}", {}) == ANSWERED
    assert read_reference(f"{server.url}/sound.wav") == SOUND
    server.status = "SETUP_FAILED"
    assert probe.main([server.url]) == 1 and serve_cog.health(server.url) == {
        "status": "SETUP_FAILED"
    }
    assert proxy.called_at == []
    with open_url("http://kimi.invalid/health-check", 9.0) as response:
        assert json.load(response) == {"status": "READY"}
    assert len(proxy.called_at) == 1


def test_loopback_is_told_from_other_hosts() -> None:
    for host in ("127.0.0.1", "127.8.0.1:80", "[::1]:1", "localhost", "LOCALHOST.:8", "0.0.0.0"):
        assert is_loopback(f"http://{host}/a"), host
    for url in (
        "http://10.0.0.1/",
        "http://kimi.test",
        "http://127.0.0.1.test",
        "data:,x",
        "",
        "http://[",
    ):
        assert not is_loopback(url), url


@pytest.mark.parametrize(
    "prefix", ["", COG_PREFIX, "Prediction failed: Generator iteration error: "]
)
def test_what_cog_puts_before_an_error_is_left_out(prefix: str) -> None:
    document = {"status": "failed", "error": f"{prefix}audio: Prediction failed: x"}
    with pytest.raises(PredictionError, match=r"ended as failed: audio: Prediction failed: x$"):
        parse_prediction(document)


def test_unreachable_server_is_named() -> None:
    with pytest.raises(PredictionError, match=r"127\.0\.0\.1:1/predictions: cannot be reached"):
        post_prediction("http://127.0.0.1:1", {})


def test_data_uri_holds_the_file(tmp_path: Path) -> None:
    path = tmp_path / "sound.ogg"
    path.write_bytes(bytes(range(256)))
    assert data_uri(path).startswith("data:audio/ogg;base64,")
    assert read_reference(data_uri(path)) == path.read_bytes()
    nameless = path.rename(tmp_path / "sound")
    assert data_uri(nameless).startswith("data:application/octet-stream;base64,")


def test_events_are_parsed_as_the_standard_says() -> None:
    lines = [
        b": keep-alive\n",
        b"\n",
        b"event: output\r\n",
        b'data: {"chunk": "a:b",\r\n',
        b'data:  "index": 0}\r\n',
        b"id: 3\n",
        b"\n",
        b"event: nothing\n",
        b"\n",
        b'data: {"b": 1}\n',
        b"\n",
        b'data: {"unfinished": 1}\n',
    ]
    assert list(parse_events(lines)) == [
        ("output", {"chunk": "a:b", "index": 0}),
        ("message", {"b": 1}),
    ]
    for broken in (b"data: {\n", b"data: 3\n", b"data: \xff\n"):
        with pytest.raises(ValueError):
            list(parse_events([broken, b"\n"]))


def events(*pairs: tuple[str, object]) -> tuple[int, bytes]:
    lines = [f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in pairs]
    return 200, "".join(lines).encode()


def test_stream_waits_and_ends_with_completed(server: Script) -> None:
    output = ("output", {"chunk": {"text": "Hi"}})
    server.answers = [
        STARTING,
        BUSY,
        events(output, ("completed", {"status": "succeeded"}), output),
    ]
    received = list(stream_prediction(server.url, {"text": "Hi"}, token="t0k"))
    assert received == [Chunk("Hi", b""), ANSWERED]
    assert server.requests[-1] == ("/predictions", "Bearer t0k", {"input": {"text": "Hi"}})


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (REFUSED, "HTTP 422: seed: -1 is less than 0"),
        (
            (406, {"error": "no streaming"}),
            "HTTP 406: no streaming; start the server with --stream",
        ),
        (events(("output", {"chunk": {}})), "ended before the answer did"),
        (events(("error", {"error": "lagged"})), "lagged"),
        (events(("error", {})), "the stream failed"),
        ((200, b"data: {\n\n"), "the stream broke"),
        ((200, b"{}"), "ended before the answer did"),
    ],
    ids=str,
)
def test_broken_stream_is_told(server: Script, answer: tuple, message: str) -> None:
    server.answers = [answer]
    with pytest.raises(PredictionError, match=message):
        list(stream_prediction(server.url, {}))


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


def test_sound_behind_a_url_is_downloaded(server: Script) -> None:
    assert parse_prediction({"text": "", "audio": f"{server.url}/sound.wav"}).audio == SOUND
    with pytest.raises(PredictionError, match=r"other\.wav' cannot be read .*404"):
        parse_prediction({"text": "", "audio": f"{server.url}/other.wav"})


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
        ({"text": "", "audio": "data:audio/wav;base64,@@@@"}, "cannot be read"),
        ({"text": "", "audio": "data:audio/wav;base64,UklG_w=="}, "cannot be read"),
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


COMPLETED = ("completed", {"status": "succeeded", "metrics": {"seed": 3}})


def test_chunks_become_the_prediction() -> None:
    events = [
        ("start", {}),
        output(text="At ", audio=None),
        ("metric", {"name": "seed"}),
        output(text=None, audio=sound(b"abcd")),
        output(text="ten."),
        output(audio=sound(b"ef")),
        output(notes=["a note"], audio_reason="a reason"),
        COMPLETED,
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
    assert list(read_stream([COMPLETED])) == [Prediction("", None, {"seed": 3})]


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
