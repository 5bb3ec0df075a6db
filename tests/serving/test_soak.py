"""Many mixed requests, some of them given up, alone and in a crowd: what is held stays flat.

Resident memory, open files, threads and temporary files of the server and its worker are read
whenever it is READY. The last part of the run may hold no more than the first part after the
warm-up. The figures are printed.

What Cog's server leaves below /tmp/coglet is not counted: other servers of the machine share
it, and it is swept (tests/serving/test_cleanup.py).
"""

from __future__ import annotations

import collections
import dataclasses
import http.client
import itertools
import json
import math
import os
import random
import re
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kimia_infer.serving.client import parse_events
from tests.serving.helpers import (
    PATIENCE,
    REFUSAL,
    SOUNDS,
    Server,
    data_uri,
    joined,
    silence,
)
from tests.serving.sounds import same_sound

LONG_ANSWER = {"text": "Tell me a story.", "audio_temperature": 2.0, "audio_top_k": 0}
MEBIBYTE = 1 << 20

READY_SECONDS = 10.0
"""Until READY after a cancel, on a machine that has other work; alone it takes far below one."""

GROWTH = {True: 64 * MEBIBYTE, False: 256 * MEBIBYTE}
"""Bytes by which resident memory may differ in a long run and in a sample, which is warming up
all the time. On a CPU, oneDNN keeps a primitive for each of the last 1024 shapes, and answers of
new lengths bring new ones. A request that leaks the samples of a long answer exceeds the first."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """What server and worker, in this order, hold; memory in bytes."""

    memory: tuple[int, ...]
    files: tuple[int, ...]
    threads: tuple[int, ...]
    temporary: int

    @classmethod
    def of(cls, server: Server, processes: list[int]) -> Reading:
        status = [Path(f"/proc/{pid}/status").read_text() for pid in processes]
        return cls(
            tuple(1024 * _number("VmRSS", text) for text in status),
            tuple(len(os.listdir(f"/proc/{pid}/fd")) for pid in processes),
            tuple(_number("Threads", text) for text in status),
            len(server.left_files()),
        )


def _number(name: str, status: str) -> int:
    return int(re.search(rf"^{name}:\s+(\d+)", status, re.MULTILINE)[1])


@dataclasses.dataclass
class Client:
    """Asks for one thing after the other, drawn from a seeded generator."""

    server: Server
    draw: random.Random
    streams: bool
    statuses: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    ready_seconds: list[float] = dataclasses.field(default_factory=list)

    def whole(self, kind: str, **inputs: Any) -> None:
        inputs = {"max_new_tokens": self.draw.choice([4, 12, 30]), **inputs}
        self.statuses[kind, self.server.predict(**inputs)["status"]] += 1

    def text(self) -> None:
        self.whole("text", text="word " * self.draw.randint(1, 200), output_type="text")

    def speech(self) -> None:
        self.whole("speech", text="Hi", audio=self.draw.choice(SOUNDS))

    def transcript(self) -> None:
        self.whole("transcript", task="transcribe", audio=self.draw.choice(SOUNDS))

    def voice(self) -> None:
        self.whole("voice", text="Hi", voice=SOUNDS[1])

    def history(self) -> None:
        chat = [
            {"role": "user", "message_type": "audio", "content": 0},
            {"role": "assistant", "message_type": "audio-text", "content": [1, "I see."]},
        ]
        sounds = [self.draw.choice(SOUNDS) for _ in chat]
        self.whole("history", text="And?", history=json.dumps(chat), history_audio=sounds)

    def refused(self) -> None:
        bad = [{"text": " "}, {"text": "a", "history": "{"}, {"audio": data_uri(b"no sound")}]
        bad += [{"audio": data_uri(silence(600))}, {"text": "word " * 9000}]
        self.whole("refused", **self.draw.choice(bad))

    def invalid(self) -> None:
        self.server.wait_for("READY")
        body = {"input": {"text": "a", "seed": "x" * self.draw.randint(1, 100_000)}}
        status, _ = self.server.request("POST", "/predictions", body)
        self.statuses["invalid", str(status)] += 1

    def canceled(self) -> None:
        self.server.wait_for("READY")
        place = f"/predictions/soak-{self.draw.getrandbits(40):x}"
        body = {"input": self.long_answer()}
        status, _ = self.server.request("PUT", place, body, Prefer="respond-async")
        assert status == 202
        time.sleep(self.draw.uniform(0, 0.6))
        state, begin = self.server.status(), time.perf_counter()
        status, _ = self.server.request("POST", f"{place}/cancel")
        assert status in (200, 404)  # 404: it was over already
        self.wait_since(f"canceled {state}", begin)

    def dropped(self) -> None:
        """A client that hangs up before the answer."""
        self.server.wait_for("READY")
        connection = http.client.HTTPConnection(self.server.url.partition("//")[2])
        headers = {"Content-Type": "application/json"}
        body = json.dumps({"input": self.long_answer()})
        connection.request("POST", "/predictions", body, headers)
        time.sleep(self.draw.uniform(0, 0.6))
        state, begin = self.server.status(), time.perf_counter()
        connection.close()
        self.wait_since(f"dropped {state}", begin)

    def dropped_stream(self) -> None:
        """A client that hangs up within the answer."""
        with self.server.stream(**self.long_answer()) as events:
            for _ in range(self.draw.randint(0, 6)):
                next(events)
            state, begin = self.server.status(), time.perf_counter()
        self.wait_since(f"dropped stream {state}", begin)

    def long_answer(self) -> dict[str, Any]:
        sound = self.draw.choice([{}, {"audio": self.draw.choice(SOUNDS)}])
        return LONG_ANSWER | sound | {"max_new_tokens": 400, "seed": self.draw.getrandbits(20)}

    def wait_since(self, kind: str, begin: float) -> None:
        self.server.wait_for("READY")
        self.ready_seconds.append(time.perf_counter() - begin)
        self.statuses[kind, "READY"] += 1

    def kinds(self) -> list[Callable[[], None]]:
        asked = [self.text, self.speech, self.transcript, self.voice, self.history]
        given_up = [self.canceled, self.dropped_stream if self.streams else self.dropped]
        return [*asked, self.refused, self.invalid, *given_up, *given_up]


@pytest.mark.parametrize("name", ["server", "streaming_server"])
def test_nothing_grows(request: pytest.FixtureRequest, long: bool, name: str) -> None:
    """All kinds in random order, 250 requests of each predictor in a long run."""
    count = 250 if long else 12
    server: Server = request.getfixturevalue(name)
    processes = server.processes()
    client = Client(server, random.Random(11), name == "streaming_server")
    readings = []
    for _ in range(math.ceil(count / len(client.kinds()))):
        round_of_all = client.kinds()
        client.draw.shuffle(round_of_all)
        for ask in round_of_all:
            ask()
            server.wait_for("READY")
            readings.append(Reading.of(server, processes))
    assert server.processes() == processes
    # What a canceled prediction has left goes with the next one.
    assert server.succeed(text="a", max_new_tokens=2)
    server.wait_for("READY")
    assert {path.name for path in server.left_files()} == {".owner"}
    print(f"{len(readings)} requests: {dict(client.statuses)}; last: {readings[-1]}")
    # What is asked rightly is answered to the end of the run, and the rest refused.
    expected = dict.fromkeys(("text", "speech", "transcript", "voice", "history"), "succeeded")
    expected |= {"refused": "failed", "invalid": "422"}
    found = {(kind, status) for kind, status in client.statuses if kind in expected}
    assert found == set(expected.items())
    # Some were given up while the model was at work.
    assert any(kind.endswith("BUSY") for kind, _ in client.statuses)
    assert len(readings) >= count
    assert max(client.ready_seconds) < READY_SECONDS
    warm = readings[len(readings) * 2 // 5 :]
    part = len(warm) // 3
    first, last = warm[:part], warm[-part:]
    check_growth(first, last, GROWTH[long])


def check_growth(first: list[Reading], last: list[Reading], allowed: int) -> None:
    """The median of what each process holds has grown by no more than ``allowed`` bytes."""
    for name, limit in (("memory", allowed), ("files", 4), ("threads", 4)):
        for process in range(len(first[0].memory)):
            before, after = (
                statistics.median(getattr(reading, name)[process] for reading in window)
                for window in (first, last)
            )
            assert after <= before + limit, f"{name} of process {process}: {before} -> {after}"


CROWD, SMALL_CROWD = 32, 26
"""Clients that ask at the same time, more than are admitted; the second without ``--long``."""

QUESTIONS = [
    {"text": "Please answer the question", "audio": sound, "seed": seed, "max_new_tokens": steps}
    for seed, (sound, steps) in enumerate(itertools.product(SOUNDS, (8, 20)))
]
QUESTIONS += [
    {"task": "transcribe", "audio": SOUNDS[1], "max_new_tokens": 10, "seed": 10},
    {"text": "Hi", "voice": SOUNDS[1], "max_new_tokens": 16, "seed": 11},
    {"text": "Hi", "output_type": "text", "text_temperature": 1.5, "text_top_k": 0, "seed": 12},
]
Answered = tuple[str, bytes, int]


def same_answer(one: Answered, other: Answered) -> bool:
    """Text, sound and seed; the sound but for rounding."""
    return (one[0], one[2]) == (other[0], other[2]) and same_sound(one[1], other[1])


class CrowdedClient:
    """One of many that share a streaming server, and ask again when they are refused."""

    def __init__(self, server: Server, seed: int):
        self.host = server.url.partition("//")[2]
        self.draw, self.counts = random.Random(seed), collections.Counter[str]()
        self.connection = http.client.HTTPConnection(self.host, timeout=PATIENCE)

    def open(self, inputs: dict[str, Any]) -> http.client.HTTPResponse:
        """The response to a request that is taken at last."""
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        while True:
            self.connection.close()
            self.connection.request("POST", "/predictions", json.dumps({"input": inputs}), headers)
            response = self.connection.getresponse()
            if response.status == 200:
                return response
            refusal = json.load(response)
            assert (response.status, refusal["error"]) == (409, REFUSAL), refusal
            self.counts["refused"] += 1
            time.sleep(self.draw.uniform(0.05, 0.2))

    def ask(self, question: dict[str, Any]) -> Answered:
        with self.open(question) as response:
            received = list(parse_events(response))
        chunks = [data["chunk"] for name, data in received if name == "output"]
        name, state = received[-1]
        assert (name, state["status"]) == ("completed", "succeeded"), state
        self.counts["answered"] += 1
        return *joined(chunks), state["metrics"]["seed"]

    def leave(self) -> None:
        """Cancel or hang up within an answer, or before it begins."""
        inputs = LONG_ANSWER | {"max_new_tokens": 300, "audio": self.draw.choice(SOUNDS)}
        with self.open(inputs) as response:
            events = parse_events(response)
            _, start = next(events)
            for _ in range(self.draw.choice([0, 0, 1, 4])):
                next(events)
            if self.draw.random() < 0.5:
                other = http.client.HTTPConnection(self.host, timeout=PATIENCE)
                while True:
                    other.request("POST", f"/predictions/{start['id']}/cancel")
                    response_to_cancel = other.getresponse()
                    response_to_cancel.read()
                    if response_to_cancel.status == 404:
                        break
                    time.sleep(0.02)
                other.close()
                _, state = collections.deque(events, 1)[0]
                # Cog calls one failed that was canceled while its worker took it over.
                error = state.get("error", "")
                at_once = "CancelationException" in error or error.endswith(" error: ")
                assert state["status"] in ("canceled", "succeeded") or at_once, state
                self.counts["canceled"] += 1
            else:
                self.counts["hung up"] += 1
        self.connection.close()

    def work(self, count: int, expected: list[Answered]) -> None:
        for _ in range(count):
            if self.draw.random() < 0.3:
                self.leave()
                continue
            number = self.draw.randrange(len(QUESTIONS))
            if not same_answer(self.ask(QUESTIONS[number]), expected[number]):
                self.counts["wrong"] += 1


def test_crowd(many_streaming_server: Server, long: bool) -> None:
    """2,000 requests of 32 clients in a long run: no wrong answer, and nothing grows or stays."""
    server, crowd = many_streaming_server, CROWD if long else SMALL_CROWD
    count = 2000 if long else 2 * crowd
    expected = [CrowdedClient(server, 0).ask(question) for question in QUESTIONS]
    assert len(set(expected)) == len(QUESTIONS)
    processes, readings = server.processes(), []
    clients = [CrowdedClient(server, seed) for seed in range(crowd)]
    rounds = 10 if long else 2
    for _ in range(rounds):
        with ThreadPoolExecutor(crowd) as pool:
            share = count // crowd // rounds
            for future in [pool.submit(client.work, share, expected) for client in clients]:
                future.result()
        server.wait_for("READY")
        deadline = time.monotonic() + PATIENCE
        while {path.name for path in server.left_files()} != {".owner"}:
            assert time.monotonic() < deadline, server.left_files()
            time.sleep(0.01)
        readings.append(Reading.of(server, processes))
    counts = sum((client.counts for client in clients), collections.Counter())
    print(dict(counts), *readings, sep="\n")
    assert counts["wrong"] == 0 and server.processes() == processes
    assert all(counts[kind] for kind in ("answered", "canceled", "hung up"))
    assert same_answer(CrowdedClient(server, 0).ask(QUESTIONS[0]), expected[0])
    part = max(rounds // 3, 1)
    check_growth(readings[-2 * part : -part], readings[-part:], GROWTH[long])
