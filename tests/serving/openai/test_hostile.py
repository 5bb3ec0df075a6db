"""Requests that nobody should send: each gets an answer, and the server stays what it was."""

from __future__ import annotations

import base64
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error

from tests.serving.helpers import PATIENCE, Server, stored
from tests.serving.openai.chats import ASKED, LONG, MODEL, SPEECH, STREAMED_SPEECH
from tests.serving.openai.waiting import wait_until_idle

CHAT = "/v1/chat/completions"


def open_files(front: Server) -> int:
    """Files and connections that the server has open."""
    return len(os.listdir(f"/proc/{front.pid}/fd"))


@pytest.fixture(autouse=True)
def unharmed(front: Server, client: openai.OpenAI) -> Iterator[None]:
    """After each test the server answers, runs nothing, and keeps no file and no connection."""
    wait_until_idle(front)
    files = open_files(front)
    yield
    wait_until_idle(front)
    answer = client.chat.completions.create(model=MODEL, messages=ASKED)
    assert answer.choices[0].message.content == "nine"
    assert stored(front) == []
    deadline = time.monotonic() + PATIENCE
    while open_files(front) > files + 3:  # connections that clients keep for their next request
        assert time.monotonic() < deadline, os.listdir(f"/proc/{front.pid}/fd")
        time.sleep(0.05)


@pytest.fixture(scope="module")
def operations(front: Server) -> list[schemathesis.APIOperation]:
    """What the server's own description says can be asked of it."""
    schema = schemathesis.openapi.from_url(f"{front.url}/openapi.json")
    return [found.ok() for found in schema.get_all_operations()]


@given(data=st.data())
@settings(suppress_health_check=list(HealthCheck))
def test_nothing_that_is_described_is_the_servers_fault(
    operations: list[schemathesis.APIOperation], data: st.DataObject
) -> None:
    """Of what the description allows, and of what it does not."""
    mode = data.draw(st.sampled_from(schemathesis.GenerationMode))
    operation = data.draw(st.sampled_from(operations))
    case = data.draw(operation.as_strategy(generation_mode=mode))
    case.call_and_validate(checks=[not_a_server_error], timeout=60)


WRONG_BODIES = {
    "empty": b"",
    "no json": b"hello",
    "half": b'{"model": "kimi-audio", "messages": [',
    "list": b"[]",
    "null": b"null",
    "deep": b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "not a number": b'{"model": "kimi-audio", "messages": [{"role": "user", "content": "a"}], '
    b'"temperature": NaN}',
    "infinite": b'{"model": "kimi-audio", "messages": [{"role": "user", "content": "a"}], '
    b'"temperature": 1e999}',
    "long number": b'{"model": "kimi-audio", "seed": ' + b"9" * 10_000 + b"}",
    "latin": '{"model": "kimi-audiö"}'.encode("latin-1"),
    "utf-16": '{"model": "kimi-audio"}'.encode("utf-16"),
    "half a pair in a name": b'{"model": "kimi-audio", "messages": [{"role": "user", "content": '
    b'"a"}], "\\ud800": 1}',
    "half a pair in the model": b'{"model": "\\ud800", "messages": [{"role": "user"}]}',
    "half a pair in an id": b'{"model": "kimi-audio", "messages": [{"role": "assistant", "audio": '
    b'{"id": "\\udfff"}}, {"role": "user", "content": "a"}]}',
    "zero byte": b'{"model": "kimi-audio\\u0000", "messages": []}',
    "wrong types": b'{"model": 5, "messages": {"role": []}, "stream": "yes", "stop": {"a": 1}}',
    "many messages": json.dumps(
        {"model": MODEL, "messages": [{"role": "user", "content": "a"}] * 3000}
    ).encode(),
    "many sounds": json.dumps({"model": MODEL, "messages": ASKED * 65}).encode(),
    "long text": json.dumps(
        {"model": MODEL, "messages": [{"role": "user", "content": "a" * 300_000}]}
    ).encode(),
}


@pytest.mark.parametrize("name", WRONG_BODIES)
def test_bodies_that_cannot_be_read_are_refused(front: Server, name: str) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.post(front.url + CHAT, content=WRONG_BODIES[name], headers=headers, timeout=60)
    assert answer.status_code in (400, 404)
    error = answer.json()["error"]
    assert error["type"] in ("invalid_request_error", "not_found_error")
    assert 10 < len(error["message"]) < 600


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = [
    "role",
    "content",
    "type",
    "text",
    "input_audio",
    "data",
    "format",
    "audio",
    "id",
    "voice",
]
FIELDS += ["modalities", "stream", "stream_options", "stop", "temperature", "seed", "max_tokens"]
FIELDS += ["n", "tools", "logprobs", "audio_top_k", "name", "refusal", "tool_calls"]


@given(data=st.data())
@settings(suppress_health_check=list(HealthCheck))
def test_bodies_that_are_nearly_right(front: Server, data: st.DataObject) -> None:
    """Something in a right body is replaced by anything: it is refused, or answered."""
    body = json.loads(json.dumps({"model": MODEL, "messages": ASKED + LONG, "max_tokens": 2}))
    if data.draw(st.booleans()):
        body |= json.loads(json.dumps(SPEECH))
    for _ in range(data.draw(st.integers(1, 3))):
        place: Any = body
        while True:
            keys = list(range(len(place))) if isinstance(place, list) else [*place, *FIELDS]
            key = data.draw(st.sampled_from(keys))
            inner = place[key] if isinstance(place, list) else place.get(key)
            if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans()):
                place[key] = data.draw(JSON)
                break
            place = inner
    content = json.dumps(body)  # with NaN and halves of pairs, as clients of all kinds send them
    answer = httpx.post(front.url + CHAT, content=content, timeout=60)
    assert answer.status_code in (200, 400, 404), answer.text


def address(front: Server) -> tuple[str, int]:
    host, _, port = front.url.removeprefix("http://").partition(":")
    return host, int(port)


def request_bytes(body: bytes, length: int | None = None) -> bytes:
    length = len(body) if length is None else length
    head = f"POST {CHAT} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {length}\r\n\r\n".encode() + body


def test_two_hundred_hang_up(front: Server) -> None:
    """At once, within the head, within the body, while they wait, and while it is answered."""
    whole = request_bytes(
        json.dumps({"model": MODEL, "messages": LONG, **STREAMED_SPEECH}).encode()
    )
    for number in range(200):
        with socket.create_connection(address(front)) as connection:
            sent = (0, 30, len(whole) - 5, len(whole), len(whole))[number % 5]
            connection.sendall(whole[:sent])
            if number % 25 == 24:
                assert connection.recv(1)


def test_half_open_connections_are_in_nobodys_way(front: Server, client: openai.OpenAI) -> None:
    """Clients that say nothing, and those that stop within a body."""
    half = request_bytes(b'{"model": ', 1000)
    waiting = [socket.create_connection(address(front)) for _ in range(40)]
    try:
        for connection in waiting[::2]:
            connection.sendall(half)
        answer = client.chat.completions.create(model=MODEL, messages=ASKED)
        assert answer.choices[0].message.content == "nine"
    finally:
        for connection in waiting:
            connection.close()


def test_whoever_reads_slowly_holds_up_nobody(front: Server, client: openai.OpenAI) -> None:
    body = json.dumps({"model": MODEL, "messages": LONG, "seed": 1, **STREAMED_SPEECH}).encode()
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        slow.connect(address(front))
        slow.sendall(request_bytes(body))
        assert slow.recv(10)
        answer = client.chat.completions.create(model=MODEL, messages=ASKED)
        assert answer.choices[0].message.content == "nine"
        received = b""
        while not received.endswith(b"0\r\n\r\n"):
            received += slow.recv(1000)
    assert b"[DONE]" in received


@pytest.mark.parametrize("content", [b"", b"A", base64.b64encode(b"RIFF" + bytes(50))])
def test_sounds_that_are_none(front: Server, content: bytes) -> None:
    part = {"type": "input_audio", "input_audio": {"data": content.decode(), "format": "mp3"}}
    body = {"model": MODEL, "messages": [{"role": "user", "content": [part]}]}
    status, answer = front.request("POST", CHAT, body)
    assert (status, answer["error"]["param"]) == (
        400,
        "messages[0].content[0].input_audio.data",
    )


def test_no_path_of_the_server_is_opened(front: Server, tmp_path: Path) -> None:
    """Paths, addresses and data URIs are no base64."""
    for data in (
        "/etc/passwd",
        "file:///etc/passwd",
        "http://127.0.0.1/a.wav",
        "data:audio/wav,AA",
    ):
        part = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
        body = {"model": MODEL, "messages": [{"role": "user", "content": [part]}]}
        status, answer = front.request("POST", CHAT, body)
        assert status == 400 and "input_audio.data: " in answer["error"]["message"]
    voice = {"voice": "../../../etc/passwd", "format": "wav"}
    body = {"model": MODEL, "messages": ASKED, **SPEECH, "audio": voice}
    status, answer = front.request("POST", CHAT, body)
    assert (status, answer["error"]["param"]) == (400, "audio.voice")
