"""A prediction that is given up stops: the model launches no further step."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.serving.conftest import PATIENCE, Server, serve_bare

ENDLESS = """
import pathlib
import time
from kimia_infer.api import engine
from kimia_infer.engine.decode import Generation
from predict import Predictor, StreamingPredictor

control, launch = engine.ControlTokens, Generation._launch
steps = pathlib.Path(__file__).with_name("steps")

def counted(self, state):
    launch(self, state)
    time.sleep(0.01)
    steps.with_suffix(".part").write_text(f"{self.launched} {self.max_steps}")
    steps.with_suffix(".part").replace(steps)

engine.ControlTokens = lambda blank, text_end, audio_ends: control(blank, -1, (-1,))
Generation._launch = counted
"""
"""Answers that only their limit ends, after a minute or so; a file says how far each one is."""

TEXT = {"text": "a", "output_type": "text"}
SPEECH = {"text": "a", "output_type": "both"}


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
    ("predictor", "ways"),
    [
        ("Predictor", (canceled, hung_up)),
        ("StreamingPredictor", (canceled, hung_up, hung_up_stream)),
    ],
)
def test_no_step_follows(
    golden: Path,
    tmp_path: Path,
    predictor: str,
    ways: tuple[Callable[[Server], contextlib.AbstractContextManager], ...],
) -> None:
    (tmp_path / "endless.py").write_text(ENDLESS)
    counter = tmp_path / "steps"

    def steps() -> tuple[int, int]:
        """Steps launched and step limit of the answer that launched one last."""
        launched, limit = counter.read_text().split()
        return int(launched), int(limit)

    reference = f"{tmp_path / 'endless.py'}:{predictor}"
    with serve_bare(golden, tmp_path, reference, predictor) as server:
        for give_up in ways:
            server.wait_for("READY")
            counter.unlink()
            with give_up(server):
                deadline = time.monotonic() + PATIENCE
                while not counter.exists() or steps()[0] < 5:
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
                assert server.status() == "BUSY"
            server.wait_for("READY")
            launched, limit = steps()
            assert 5 <= launched < limit, give_up.__name__
            time.sleep(0.1)
            assert steps() == (launched, limit), give_up.__name__
        assert server.succeed(**TEXT, max_new_tokens=2)
