"""URLs in requests to a running service: nobody's server holds its slot, nothing of it stays."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from collections.abc import Callable

import pytest

from tests.serving.helpers import AUDIO, COG_PREFIX, LIMIT, PATIENCE, Server, stored
from tests.serving.web import BODY, Web, answers, drips, floods, web

TEXT = {"output_type": "text", "max_new_tokens": 2}
SOUND = (AUDIO / "station.wav").read_bytes()


def test_sound_of_a_url_is_that_of_the_file(limited_server: Server) -> None:
    with web(answers(SOUND)) as first, web(answers(b"", "302 Found", Location=first.url)) as last:
        heard = limited_server.succeed(**TEXT, audio=last.url)["metrics"]["input_audio_seconds"]
    assert heard > 0 and stored(limited_server) == []


def test_only_public_hosts_are_called(server: Server) -> None:
    with web(answers(SOUND)) as inner:
        history = json.dumps([{"role": "user", "message_type": "audio", "content": 0}])
        for name, value in {
            "audio": {"audio": inner.url},
            "voice": {"text": "a", "voice": inner.url, "output_type": "both"},
            "history_audio[0]": {"text": "a", "history": history, "history_audio": [inner.url]},
        }.items():
            error = server.fail(**TEXT | value)
            assert f" {name}: not a public address" in error and "KIMI_AUDIO_URLS" in error
        assert inner.called_at == []


def test_a_request_that_is_refused_anyway_downloads_nothing(limited_server: Server) -> None:
    with web(answers(SOUND)) as inner:
        assert "max_new_tokens" in limited_server.fail(
            **TEXT | {"audio": inner.url, "max_new_tokens": 0}
        )
        assert "voice" in limited_server.fail(**TEXT | {"audio": inner.url, "voice": inner.url})
        assert inner.called_at == []


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        (drips(BODY), "not read completely within 2 s"),
        (floods, "larger than 1 MB"),
        (answers(b"gone", "404 Not Found"), "the server answered HTTP 404"),
    ],
    ids=["drip", "flood", "404"],
)
def test_a_download_that_fails_leaves_nothing(
    limited_server: Server, behaviour: Callable, reason: str
) -> None:
    with web(behaviour) as outer:
        begun = time.monotonic()
        error = limited_server.fail(**TEXT, audio=outer.url)
        assert time.monotonic() - begun < LIMIT + 2
        assert error == f"{COG_PREFIX}audio: {error.rpartition(' audio: ')[2]}"
        assert reason in error and stored(limited_server) == []
        assert outer.left.wait(PATIENCE)


def test_the_limit_holds_for_all_urls_of_a_request(limited_server: Server) -> None:
    message = {"role": "user", "message_type": "audio"}
    history = json.dumps([message | {"content": index} for index in range(3)])
    with web(answers(SOUND + bytes(400_000))) as outer:
        error = limited_server.fail(
            text="a", **TEXT, history=history, history_audio=[outer.url] * 3
        )
    assert "history_audio[2]: larger than" in error and len(outer.called_at) == 3


@contextlib.contextmanager
def canceled(server: Server, inputs: dict, outer: Web):
    body = {"input": inputs}
    assert server.request("PUT", "/predictions/slow", body, Prefer="respond-async")[0] == 202
    yield
    assert server.request("POST", "/predictions/slow/cancel")[0] == 200


@contextlib.contextmanager
def hung_up(server: Server, inputs: dict, outer: Web):
    connection = http.client.HTTPConnection(server.url.partition("//")[2], timeout=PATIENCE)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/predictions", json.dumps({"input": inputs}), headers)
    yield
    connection.close()


@pytest.mark.parametrize("give_up", [canceled, hung_up])
def test_a_caller_who_leaves_ends_the_download(limited_server: Server, give_up: Callable) -> None:
    with web(drips(BODY + SOUND)) as outer:
        limited_server.wait_for("READY")
        with give_up(limited_server, TEXT | {"audio": outer.url}, outer):
            while not outer.called_at:
                time.sleep(0.01)
            assert limited_server.status() == "BUSY"
            begun = time.monotonic()
        limited_server.wait_for("READY")
        assert time.monotonic() - begun < 1.0
        assert outer.left.wait(PATIENCE)
    limited_server.succeed(text="a", **TEXT)
    assert stored(limited_server) == []
