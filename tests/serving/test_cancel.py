"""A prediction that is given up stops: the model launches no further step."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from collections.abc import Callable, Iterator

import pytest

from tests.serving.helpers import PATIENCE, Server

LIMIT = 400
SAMPLED = {"text_temperature": 2.0, "text_top_k": 0, "audio_temperature": 2.0, "audio_top_k": 0}
TEXT = {"text": "a", "output_type": "text", "seed": 11, "max_new_tokens": LIMIT} | SAMPLED
SPEECH = TEXT | {"output_type": "both"}


@contextlib.contextmanager
def canceled(server: Server) -> Iterator[None]:
    body = {"input": TEXT}
    assert server.request("PUT", "/predictions/a", body, Prefer="respond-async")[0] == 202
    yield
    assert server.request("POST", "/predictions/a/cancel")[0] == 200


@contextlib.contextmanager
def hung_up(server: Server) -> Iterator[None]:
    connection = http.client.HTTPConnection(server.url.partition("//")[2], timeout=PATIENCE)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/predictions", json.dumps({"input": SPEECH}), headers)
    yield
    connection.close()


@contextlib.contextmanager
def hung_up_stream(server: Server) -> Iterator[None]:
    with server.stream(**SPEECH) as events:
        assert next(data for name, data in events if name == "output")
        yield


@pytest.mark.parametrize(
    ("name", "ways"),
    [
        ("scripted_server", (canceled, hung_up)),
        ("streaming_server", (canceled, hung_up, hung_up_stream)),
    ],
    ids=["whole", "streaming"],
)
def test_no_step_follows(
    request: pytest.FixtureRequest,
    name: str,
    ways: tuple[Callable[[Server], contextlib.AbstractContextManager], ...],
) -> None:
    server: Server = request.getfixturevalue(name)
    counter, slow = (server.files.parent / name for name in ("steps", "slow"))
    assert server.succeed(**TEXT | {"max_new_tokens": 2})
    slow.touch()
    request.addfinalizer(slow.unlink)
    for give_up in ways:
        server.wait_for("READY")
        before = int(counter.read_text())
        with give_up(server):
            deadline = time.monotonic() + PATIENCE
            while int(counter.read_text()) < before + 5:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert server.status() == "BUSY"
        server.wait_for("READY")
        launched = int(counter.read_text())
        assert 5 <= launched - before < LIMIT, give_up.__name__
        time.sleep(0.1)
        assert int(counter.read_text()) == launched, give_up.__name__
    assert server.succeed(**TEXT | {"max_new_tokens": 2})
