"""Many clients: what they heard and when, and that library and server give the same answers."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.utils.errors import RequestError
from scripts.benchmark import concurrency
from scripts.benchmark.concurrency import (
    Answer,
    Piece,
    Way,
    answers_of,
    closed_loop,
    counter,
    dry_seconds,
    empty_table,
    follow,
    library,
    measure,
    open_loop,
    poisson_arrivals,
    summary,
)
from scripts.benchmark.picture import PANELS, figure_of
from scripts.benchmark.random_models import random_components
from scripts.benchmark.requests import default_question
from scripts.benchmark.server import server
from scripts.benchmark.sizes import SIZES
from tests.paths import MINI, ROOT

PATIENCE = 60
"""Seconds to wait for anything; only what is broken ever takes them."""

SERVING = """
import os, sys
from pathlib import Path
from scripts.benchmark.server import serving
with serving(Path(sys.argv[1]), {"KIMI_AUDIO_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}) as found:
    print(*found, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("sound", "dry"),
    [
        ([], 0.0),
        ([(5.0, 1.0)], 0.0),
        ([(5.0, 1.0), (5.5, 2.0), (8.0, 1.0)], 0.0),  # the last comes just in time
        ([(5.0, 1.0), (6.5, 1.0), (7.0, 1.0)], 0.5),  # what plays late is played in full
        ([(5.0, 1.0), (7.0, 1.0), (9.0, 1.0)], 2.0),
        ([(5.0, 3.0), (6.0, 1.0), (9.25, 1.0)], 0.25),
    ],
)
def test_gaps_that_a_listener_hears(sound: list[tuple[float, float]], dry: float) -> None:
    assert dry_seconds(sound) == dry


def test_arrivals_are_random_and_the_same_for_a_seed() -> None:
    arrivals = poisson_arrivals(4000, rate=2.0, seed=3)
    assert arrivals == poisson_arrivals(4000, 2.0, 3) != poisson_arrivals(4000, 2.0, 4)
    assert arrivals[0] == 0 and arrivals == sorted(arrivals)
    gaps = torch.tensor(arrivals).diff()
    # Exponential: mean and deviation are equal.
    assert gaps.mean() == pytest.approx(0.5, rel=0.05)
    assert gaps.std() == pytest.approx(0.5, rel=0.1)


def test_what_a_client_hears() -> None:
    answer = Answer(asked=10.0)
    answer.hear(11.0, Piece(sound=0.5))
    answer.hear(12.0, Piece(text=True))
    answer.hear(13.0, Piece(text=True, sound=0.25))
    answer.hear(14.0, Piece(steps=7))
    assert answer == Answer(10.0, 12.0, [(11.0, 0.5), (13.0, 0.25)], 7)


def test_a_summary() -> None:
    answers = [
        Answer(0.0, 0.5, [(1.0, 1.0), (3.0, 1.0)], 20, 4.0),  # dry for 1 s
        Answer(1.0, 1.25, [(2.0, 2.0), (3.0, 1.0)], 40, 5.0),
        Answer(2.0, 2.75, [], 20, 4.0),
        Answer(2.0, None, [(2.5, 9.0)], 0, 8.0, error="no memory"),
    ]
    found = summary(answers)
    assert found["answers"] == 3 and found["speech, s"] == 5.0
    assert found["requests/s"] == 3 / 8 and found["steps/s"] == 10.0
    assert found["first text p50, ms"] == 500.0 and found["first sound p50, ms"] == 1000.0
    assert found["first text p95, ms"] == pytest.approx(725)
    assert found["run dry, %"] == 50.0
    assert found["dry, mean s"] == found["dry, longest s"] == 1.0


def test_a_summary_of_failures_has_no_delays() -> None:
    found = summary([Answer(0.0, ended=1.0, error="busy")])
    assert found["requests/s"] == 0
    assert found["first sound p95, ms"] is found["run dry, %"] is found["dry, longest s"] is None


def test_clients_of_a_closed_loop_ask_together_and_in_turn() -> None:
    together, seeds = threading.Barrier(3), []

    def ask(seed: int) -> Iterator[Piece]:
        seeds.append(seed)
        together.wait(PATIENCE)  # breaks unless three ask at a time
        yield Piece(steps=1)

    counted: list[int] = []
    answers = closed_loop(ask, 3, 4, lambda: counted.append(1))
    assert sorted(seeds) == list(range(12)) and len(counted) == 12
    assert [sorted(seeds[i : i + 3]) for i in (0, 3, 6, 9)] == [
        [0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11],
    ]  # fmt: skip
    assert all(answer.error is None and answer.steps == 1 for answer in answers)


def test_an_open_loop_waits_for_nobody() -> None:
    last = threading.Event()

    def ask(seed: int) -> Iterator[Piece]:
        if seed == 2:
            last.set()
        assert last.wait(PATIENCE)
        yield Piece(steps=seed)

    answers = open_loop(ask, [0.0, 0.01, 0.02])
    assert [answer.steps for answer in answers] == [0, 1, 2]
    moments = [answer.asked - answers[0].asked for answer in answers]
    assert moments == pytest.approx([0.0, 0.01, 0.02])  # when it was due, not when it began


def test_failures_are_problems_of_the_table() -> None:
    failing = itertools.cycle([False, True])

    def ask(seed: int) -> Iterator[Piece]:
        if next(failing):
            raise RequestError("audio: too loud")
        yield Piece(text=True)

    table = empty_table(1)
    measure(Way("library", ask, dict), [2], 1, table)
    assert table.problems == [
        "library, closed loop, 2 clients: 1 of 2 failed: audio: too loud",
        "library, open loop, 2 clients: 1 of 2 failed: audio: too loud",
    ]
    assert [row["answers"] for row in table.rows] == [1, 1]


def test_an_error_of_the_program_is_not_a_failed_request() -> None:
    def ask(seed: int) -> Iterator[Piece]:
        raise KeyError(seed)
        yield

    with pytest.raises(KeyError):
        closed_loop(ask, 2, 1)


def test_the_tiny_model_through_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """All answers have full length, as random weights never end one."""
    monkeypatch.setitem(concurrency.INPUTS, "max_new_tokens", 31)
    components = random_components(SIZES["tiny"], torch.device("cpu"), torch.float32)
    model = KimiAudio.from_components(components, head_rows="track")
    table, told = empty_table(2), []
    count = counter(lambda done, total: told.append((done, total)), answers_of([1, 3], 2))
    measure(library(model, default_question()), [1, 3], 2, table, count)
    assert sorted(told) == [(done, 17) for done in range(1, 18)]
    assert [(row["loop"], row["clients"], row["answers"]) for row in table.rows] == [
        ("closed", 1, 2), ("open", 1, 2), ("closed", 3, 6), ("open", 3, 6),
    ]  # fmt: skip
    for row in table.rows:
        assert row["speech, s"] == pytest.approx(2.0 * row["answers"])
        assert row["steps/s"] == pytest.approx(31 * row["requests/s"])
        assert row["first text p50, ms"] < row["first sound p95, ms"]
        assert row["RAM at most, GB"] > 0.05
    assert not table.problems


def test_a_server_answers_as_the_library_and_ends_with_its_owner() -> None:
    command = [sys.executable, "-c", SERVING, str(MINI)]
    pipe = subprocess.PIPE
    owner = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)
    assert owner.stdout is not None
    url, process = owner.stdout.readline().split()
    model = KimiAudio(MINI, device="cpu", head_rows="track")
    question = default_question()
    ways = server(url, question, int(process)), library(model, question)
    for seed in (0, 1):
        heard, expected = (follow(way.ask, seed, time.monotonic()) for way in ways)
        assert heard.error is expected.error is None
        assert heard.steps == expected.steps > 0 and heard.first_text is not None
        seconds = [sum(length for _, length in answer.sound) for answer in (heard, expected)]
        assert seconds[0] == pytest.approx(seconds[1]) and seconds[0] > 0
    # That of the process with the model, which is not the one that was started.
    assert ways[0].memory()["RAM at most, GB"] > 0.3
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    deadline = time.monotonic() + PATIENCE
    while Path(f"/proc/{process}").exists() and "Z" not in state_of(process):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def state_of(process: str) -> str:
    try:
        return Path("/proc", process, "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_a_picture_has_a_line_for_each_loop_and_way() -> None:
    rows = [
        {"through": way, "loop": loop, "clients": clients, "steps/s": 10.0 * clients}
        | {"first sound p95, ms": None if clients == 1 else 5.0, "run dry, %": 0.0}
        for way in ("server", "library")
        for loop in ("closed", "open")
        for clients in (1, 8)
    ]
    figure = figure_of(rows, {"model": "random, tiny size", "date": "2026-11-29"})
    assert len(figure.axes) == len(PANELS)
    steps, sound, _ = figure.axes
    assert [line.get_label() for line in steps.lines] == [
        "server, closed loop", "server, open loop", "library, closed loop", "library, open loop",
    ]  # fmt: skip
    assert steps.lines[0].get_xydata().tolist() == [[1.0, 10.0], [8.0, 80.0]]
    assert sound.lines[0].get_xydata().tolist() == [[8.0, 5.0]]
    assert figure.get_suptitle() == "random, tiny size; 2026-11-29"
