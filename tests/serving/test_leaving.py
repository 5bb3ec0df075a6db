"""Callers who hang up or cancel, and servers behind URLs that misbehave, drawn at random.

Whatever either does, the service answers with HTTP 200 or 4xx, is READY again at most two seconds
after its time limit, and keeps no file.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.serving.helpers import AUDIO, LIMIT, PATIENCE, Server, data_uri, stored
from tests.serving.web import BODY, answers, drips, floods, is_silent, web

LONG = settings.get_current_profile_name() == "long"
SOUND = (AUDIO / "station.wav").read_bytes()
TEXT = {"output_type": "text", "text": "a", "text_temperature": 2.0, "text_top_k": 0}
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"

QUICK = {
    "sound": answers(SOUND),
    "no sound": answers(b"<html>"),
    "error": answers(b"", "500 Internal Server Error"),
    "short": answers(SOUND, Content_Length=str(len(SOUND) + 1)),
    "loop": answers(b"", "308 Permanent Redirect", Location="/"),
    "elsewhere": answers(b"", "302 Found", Location="http://127.0.0.1:1/"),
    "flood": floods,
    "chunks": lambda connection: connection.sendall(CHUNKED + b"fffffffff\r\n"),
    "nothing": lambda connection: None,
}
SLOW = {"drip": drips(BODY + SOUND), "head": drips(b"HTTP/1.1 "), "silence": is_silent}
SLOW |= {"stall": drips(BODY, 9.0), "chunk": drips(CHUNKED)}
SERVERS = QUICK | SLOW

moments = st.floats(0.0, 0.25)
ends = st.sampled_from(["hang up", "cancel"])


@contextlib.contextmanager
def asked(server: Server, inputs: dict[str, Any], end: str, name: str):
    """A request that the caller gives up, or whose answer is awaited."""
    body = {"input": inputs}
    if end == "cancel":
        status, _ = server.request("PUT", f"/predictions/{name}", body, Prefer="respond-async")
        assert status == 202
        yield
        # Cog loses some that come at once: docs/deploy.md.
        while server.request("POST", f"/predictions/{name}/cancel")[0] != 404:
            time.sleep(0.02)
        return
    connection = http.client.HTTPConnection(server.url.partition("//")[2], timeout=PATIENCE)
    connection.request(
        "POST", "/predictions", json.dumps(body), {"Content-Type": "application/json"}
    )
    yield
    if end == "wait":
        response = connection.getresponse()
        answer = json.load(response)
        assert response.status == 200 and answer["status"] in ("succeeded", "failed"), answer
    connection.close()


def sometimes(count: int) -> Callable[[Callable], Callable]:
    return settings(
        max_examples=10 * count if LONG else count,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
        database=None,
    )


def check(server: Server, inputs: dict[str, Any], end: str, moment: float) -> None:
    server.wait_for("READY")
    begun = time.monotonic()
    with asked(server, inputs, end, f"p{time.monotonic_ns()}"):
        time.sleep(moment)
    server.wait_for("READY")
    # Of a caller who hangs up at once, the service may not have known yet.
    while stored(server) and time.monotonic() - begun < LIMIT + 2:
        time.sleep(0.02)
    server.wait_for("READY")
    assert time.monotonic() - begun < LIMIT + 2
    assert stored(server) == []


@sometimes(15)
@given(name=st.sampled_from(list(SERVERS)), end=ends, moment=moments, wait=st.booleans())
def test_urls(limited_server: Server, name: str, end: str, moment: float, wait: bool) -> None:
    end = "wait" if wait and (LONG or name in QUICK) else end
    with web(SERVERS[name]) as outer:
        inputs = TEXT | {"audio": outer.url, "max_new_tokens": 8}
        check(limited_server, inputs, end, moment)
        assert not outer.called_at or outer.left.wait(PATIENCE)


@sometimes(15)
@given(end=ends, moment=moments, sound=st.booleans(), task=st.sampled_from(["chat", "transcribe"]))
def test_answers(limited_server: Server, end: str, moment: float, sound: bool, task: str) -> None:
    inputs = TEXT | ({"audio": data_uri(SOUND), "task": task} if sound else {})
    check(limited_server, inputs, end, moment)


def test_service_is_the_same(limited_server: Server) -> None:
    """Last: the same processes still answer."""
    log = (limited_server.files.parent / "log").read_text()
    assert "panicked" not in log and "Traceback" not in log and "Worker crashed" not in log
    limited_server.succeed(**TEXT | {"max_new_tokens": 2})
