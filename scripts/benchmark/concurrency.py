"""Many clients who ask for speech at a time, through the library or a server.

In a closed loop every client asks again as soon as it is answered. In an open loop requests come at
random moments (Poisson), whoever is still being answered.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from kimia_infer.api.events import AudioChunk, Completion, TextDelta
from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.parameters import CODES_PER_SECOND
from kimia_infer.serving.client import PredictionError
from kimia_infer.utils.errors import RequestError
from scripts.benchmark.measuring import memory
from scripts.benchmark.report import Table
from scripts.benchmark.requests import REPLY_SECONDS, REQUESTS, SAMPLING, Audio, spoken_chat
from scripts.benchmark.sizes import PUBLISHED

OPEN_LOAD = 0.8
"""Requests come in an open loop at this share of the rate of as many clients in a closed loop."""

INPUTS = {
    **REQUESTS["speech, low latency"],
    **SAMPLING,
    "max_new_tokens": PUBLISHED.language_model.audio_delay
    + round(REPLY_SECONDS * CODES_PER_SECOND),
}
"""Of every request but for its seed; what library and server call by the same names."""


class Piece(NamedTuple):
    """What arrived at one moment: text, seconds of sound, or, at the end, the decode steps."""

    text: bool = False
    sound: float = 0.0
    steps: int = 0


Ask = Callable[[int], Iterable[Piece]]
"""The answer to a question, by its seed. Raises RequestError or PredictionError."""


@dataclass
class Answer:
    """When a client heard what; seconds of the monotonic clock.

    ``sound`` holds the moments and seconds of what arrived. ``error`` says why it failed.
    """

    asked: float
    first_text: float | None = None
    sound: list[tuple[float, float]] = field(default_factory=list)
    steps: int = 0
    ended: float = 0.0
    error: str | None = None

    def hear(self, moment: float, piece: Piece) -> None:
        if piece.text and self.first_text is None:
            self.first_text = moment
        if piece.sound:
            self.sound.append((moment, piece.sound))
        self.steps += piece.steps


def dry_seconds(sound: Iterable[tuple[float, float]]) -> float:
    """How long a listener waits in gaps, who plays the first piece at once and what comes then.

    ``sound`` are the moments and seconds of the pieces, in order.
    """
    gaps, end = 0.0, None
    for moment, seconds in sound:
        if end is not None and moment > end:
            gaps += moment - end
        end = (moment if end is None else max(moment, end)) + seconds
    return gaps


def poisson_arrivals(count: int, rate: float, seed: int) -> list[float]:
    """Moments of ``count`` arrivals, ``rate`` a second on average, in seconds from 0."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, count)
    return (gaps.cumsum() - gaps[0]).tolist()


def follow(ask: Ask, seed: int, asked: float) -> Answer:
    """The answer to a question that was ``asked`` at a moment, once it is complete."""
    answer = Answer(asked)
    try:
        for piece in ask(seed):
            answer.hear(time.monotonic(), piece)
    except (RequestError, PredictionError) as error:
        answer.error = str(error)
    answer.ended = time.monotonic()
    return answer


def closed_loop(
    ask: Ask, clients: int, rounds: int, count: Callable[[], None] = lambda: None
) -> list[Answer]:
    """``clients`` ask ``rounds`` times each; ``count`` is called after each answer."""
    together = threading.Barrier(clients)

    def client(index: int) -> list[Answer]:
        together.wait()
        found = []
        for turn in range(rounds):
            found.append(follow(ask, turn * clients + index, time.monotonic()))
            count()
        return found

    with ThreadPoolExecutor(clients) as threads:
        return [answer for found in threads.map(client, range(clients)) for answer in found]


def open_loop(
    ask: Ask, arrivals: Sequence[float], count: Callable[[], None] = lambda: None
) -> list[Answer]:
    """A question at each of the ``arrivals``, seconds from now."""

    def client(seed: int, asked: float) -> Answer:
        answer = follow(ask, seed, asked)
        count()
        return answer

    with ThreadPoolExecutor(len(arrivals)) as threads:
        began = time.monotonic()
        asked = []
        for seed, arrival in enumerate(arrivals):
            time.sleep(max(0.0, began + arrival - time.monotonic()))
            asked.append(threads.submit(client, seed, began + arrival))
        return [future.result() for future in asked]


def percentiles(seconds: Sequence[float], name: str) -> dict[str, float | None]:
    """p50 and p95 in ms, None of nothing."""
    return {
        f"{name} p{q}, ms": 1e3 * float(np.percentile(seconds, q)) if seconds else None
        for q in (50, 95)
    }


def summary(answers: Sequence[Answer]) -> dict[str, float | None]:
    """Rates, delays and gaps of answers that were given in the same time; those that failed count
    for nothing."""
    good = [answer for answer in answers if answer.error is None]
    taken = max(answer.ended for answer in answers) - min(answer.asked for answer in answers)
    spoken = [answer for answer in good if answer.sound]
    gaps = [gap for answer in spoken if (gap := dry_seconds(answer.sound)) > 0]
    texts = [answer.first_text - answer.asked for answer in good if answer.first_text is not None]
    return {
        "answers": len(good),
        "requests/s": len(good) / taken,
        "steps/s": sum(answer.steps for answer in good) / taken,
        "speech, s": sum(seconds for answer in good for _, seconds in answer.sound),
        **percentiles(texts, "first text"),
        **percentiles([answer.sound[0][0] - answer.asked for answer in spoken], "first sound"),
        "run dry, %": 100 * len(gaps) / len(spoken) if spoken else None,
        "dry, mean s": sum(gaps) / len(gaps) if gaps else None,
        "dry, longest s": max(gaps) if gaps else None,
    }


@dataclass(frozen=True)
class Way:
    """How clients reach the model, and the GB that it takes, by the name of the column."""

    name: str
    ask: Ask
    memory: Callable[[], dict[str, float]]


def empty_table(rounds: int) -> Table:
    return Table(
        f"Requests for speech: {rounds} for each client",
        [],
        [
            "Closed: every client asks again once it is answered. Open: as many requests come at "
            f"random, at {OPEN_LOAD} of the rate of the closed loop. A request that waits for a "
            "slot has begun.",
            "Run dry: share of the spoken answers whose playback, begun with the first sound, "
            "has to wait for more; for how long in all. Memory: up to then.",
        ],
    )


def measure(
    way: Way,
    clients: Sequence[int],
    rounds: int,
    table: Table,
    count: Callable[[], None] = lambda: None,
) -> None:
    """Add to ``table`` both loops with each number of ``clients``, who ask ``rounds`` times each.

    ``count`` is called after each answer, of which there are :func:`answers_of`.
    """
    closed_loop(way.ask, clients=1, rounds=1, count=count)
    for number in clients:
        answers = closed_loop(way.ask, number, rounds, count)
        closed = add_row(table, way, "closed", number, answers)
        # Where nothing was answered, the open loop is skipped.
        if rate := closed["requests/s"]:
            arrivals = poisson_arrivals(number * rounds, OPEN_LOAD * rate, seed=number)
            add_row(table, way, "open", number, open_loop(way.ask, arrivals, count))


def answers_of(clients: Sequence[int], rounds: int) -> int:
    """Answers in :func:`measure`: one to warm up, then two loops with each number of clients."""
    return 1 + 2 * rounds * sum(clients)


def counter(report: Callable[[int, int], None], total: int) -> Callable[[], None]:
    """A function for any thread that reports how often it was called, and ``total``."""
    numbers = itertools.count(1)
    return lambda: report(next(numbers), total)


def add_row(
    table: Table, way: Way, loop: str, clients: int, answers: Sequence[Answer]
) -> dict[str, float | None]:
    found = summary(answers)
    table.rows.append(
        {"through": way.name, "loop": loop, "clients": clients, **found, **way.memory()}
    )
    errors = [answer.error for answer in answers if answer.error is not None]
    if errors:
        failed = f"{len(errors)} of {len(answers)} failed: {errors[0]}"
        table.problems.append(f"{way.name}, {loop} loop, {clients} clients: {failed}")
    return found


def library(model: KimiAudio, audio: Audio) -> Way:
    """Threads that share ``model``."""

    def ask(seed: int) -> Iterator[Piece]:
        for event in model.stream(spoken_chat(audio), **INPUTS | {"seed": seed}):
            if isinstance(event, TextDelta):
                yield Piece(text=True)
            elif isinstance(event, AudioChunk):
                yield Piece(sound=len(event.wav) / event.sample_rate)
            elif isinstance(event, Completion):
                yield Piece(steps=event.metrics["decode_steps"])

    return Way("library", ask, lambda: peak_memory(model.device))


def peak_memory(device: torch.device) -> dict[str, float]:
    return {name: value for name, value in memory(device).items() if "at most" in name}
