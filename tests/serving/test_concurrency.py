"""Many clients at once: each gets its own answer, and none loses anything by another's leaving."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import predict
from kimia_infer.commands import serve_cog
from tests.serving.helpers import (
    ADMITTED,
    PATIENCE,
    REFUSAL,
    SOUNDS,
    Server,
    data_uri,
    joined,
    samples,
    silence,
    stored,
    whole,
)
from tests.serving.sounds import same_sound
from tests.serving.web import BODY, drips, web

TEXTS = ("anna has a blue key", "nine red birds", "the train is late", "ben sees two dogs")
REQUESTS = [
    {"text": f"Please read aloud: {TEXTS[0]}"},
    {"text": f"Please read aloud: {TEXTS[1]}", "preset": "quality"},
    {"text": "Please answer the question", "audio": SOUNDS[0]},
    {"text": "Please answer the question", "audio": SOUNDS[1], "voice": SOUNDS[0]},
    {"task": "transcribe", "audio": SOUNDS[1], "max_new_tokens": 30},
    {"text": f"Please read aloud: {TEXTS[2]}", "voice": SOUNDS[1]},
    {"text": "Please answer the question", "audio": SOUNDS[2], "text_temperature": 1.0},
    {"text": f"Please read aloud: {TEXTS[3]}", "audio_temperature": 1.5, "audio_top_k": 0},
]
REQUESTS = [{"seed": seed, "max_new_tokens": 50} | inputs for seed, inputs in enumerate(REQUESTS)]
LONG = {"text": "Tell me a story.", "text_temperature": 2.0, "text_top_k": 0}
LONG |= {"audio_temperature": 2.0, "audio_top_k": 0, "max_new_tokens": 400, "seed": 1}


def answer(server: Server, inputs: dict[str, Any]) -> tuple[str, bytes, float]:
    """Text, samples, and seconds of sound that were heard."""
    inputs = {name: value for name, value in inputs.items() if name != "preset"}
    state = server.succeed(**inputs)
    assert state["metrics"]["seed"] == inputs["seed"]
    output = state["output"]
    sound = b"" if output["audio"] is None else samples(output["audio"])
    return output["text"], sound, state["metrics"]["input_audio_seconds"]


def streamed(server: Server, inputs: dict[str, Any]) -> tuple[str, bytes, float]:
    chunks, state = whole(server, **inputs)
    assert state["status"] == "succeeded", state
    assert state["metrics"]["seed"] == inputs["seed"]
    return *joined(chunks), state["metrics"]["input_audio_seconds"]


@pytest.mark.parametrize(
    ("name", "ask"),
    [("many_server", answer), ("many_streaming_server", streamed)],
    ids=["whole", "streaming"],
)
def test_each_is_answered_as_if_alone(
    request: pytest.FixtureRequest, name: str, ask: Callable[[Server, dict], tuple]
) -> None:
    server: Server = request.getfixturevalue(name)
    alone = [ask(server, inputs) for inputs in REQUESTS]
    assert len({found[0] for found in alone}) > 4, "the answers differ"
    assert sum(len(found[1]) > 48_000 for found in alone) > 3, "half speak for a second"
    with ThreadPoolExecutor(len(REQUESTS)) as clients:
        together = list(clients.map(lambda inputs: ask(server, inputs), REQUESTS))
    for (text, sound, heard), (text_together, sound_together, heard_together) in zip(
        alone, together, strict=True
    ):
        assert (text, heard) == (text_together, heard_together)
        assert same_sound(sound, sound_together)
    server.wait_for("READY")
    assert stored(server) == []


@contextlib.contextmanager
def all_slots_held(server: Server) -> Iterator[list[str]]:
    """As many predictions as are admitted, all of which wait for a sound; their ids."""
    names = [f"held-{time.monotonic_ns()}-{index}" for index in range(ADMITTED)]
    with contextlib.ExitStack() as webs:
        for name in names:
            outer = webs.enter_context(web(drips(BODY)))
            body = {"input": {"audio": outer.url}}
            place = f"/predictions/{name}"
            assert server.request("PUT", place, body, Prefer="respond-async")[0] == 202
            while not outer.called_at:
                time.sleep(0.01)
        yield names
        for name in names:
            while server.request("POST", f"/predictions/{name}/cancel")[0] != 404:
                time.sleep(0.01)


def test_more_than_the_maximum_are_refused_clearly(many_server: Server) -> None:
    server = many_server
    with all_slots_held(server) as names:
        assert server.status() == "BUSY"
        assert len(stored(server)) == ADMITTED
        status, refusal = server.request("POST", "/predictions", {"input": {"text": "a"}})
        assert (status, refusal["error"]) == (409, REFUSAL)
        # One leaves, and there is room for one.
        assert server.request("POST", f"/predictions/{names[0]}/cancel")[0] == 200
        assert server.succeed(text="a", output_type="text", max_new_tokens=2)
    server.wait_for("READY")
    assert stored(server) == []


def hang_up(server: Server, inputs: dict[str, Any], seconds: float) -> None:
    connection = http.client.HTTPConnection(server.url.partition("//")[2], timeout=PATIENCE)
    headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
    connection.request("POST", "/predictions", json.dumps({"input": inputs}), headers)
    time.sleep(seconds)
    connection.close()


def cancel(server: Server, inputs: dict[str, Any], seconds: float) -> None:
    place = f"/predictions/left-{time.monotonic_ns()}"
    body = {"input": inputs}
    assert server.request("PUT", place, body, Prefer="respond-async")[0] == 202
    time.sleep(seconds)
    while server.request("POST", f"{place}/cancel")[0] != 404:
        time.sleep(0.01)


def test_who_leaves_takes_nothing_from_the_others(many_streaming_server: Server) -> None:
    server = many_streaming_server
    asked = [REQUESTS[index] for index in (0, 3, 5)]
    alone = [streamed(server, inputs) for inputs in asked]
    done = threading.Event()

    def leave(number: int) -> int:
        count = 0
        while not done.is_set():
            give_up = (hang_up, cancel)[(number + count) % 2]
            give_up(server, LONG | {"audio": data_uri(silence(2))}, 0.1 * (count % 4))
            count += 1
        return count

    with ThreadPoolExecutor(len(REQUESTS)) as clients:
        leaving = [clients.submit(leave, number) for number in range(2)]
        together = list(clients.map(lambda inputs: streamed(server, inputs), asked))
        done.set()
        assert sum(future.result() for future in leaving) > 2
    assert together == alone
    deadline = time.monotonic() + PATIENCE
    while stored(server):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_server_takes_as_many_as_the_image_or_twice_the_slots() -> None:
    taken = serve_cog.max_concurrency({})
    for predictor in (predict.Predictor, predict.StreamingPredictor):
        assert predictor.run.__cog_concurrent_max__ == taken
    assert serve_cog.max_concurrency({"KIMI_AUDIO_SLOTS": "4"}) == 8
    assert serve_cog.max_concurrency({"KIMI_AUDIO_SLOTS": "many"}) == taken  # refused at set-up


def test_client_that_asks_one_after_the_other_is_never_refused(many_server: Server) -> None:
    for number in range(60):
        body = {"input": {"text": str(number), "output_type": "text", "max_new_tokens": 1}}
        assert many_server.request("POST", "/predictions", body)[0] == 200
