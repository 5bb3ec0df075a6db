"""Answers of the model to items, one or several at a time.

Recordings are loaded ahead in a thread while the model answers.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np

from kimia_infer.api.events import Completion
from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.parameters import Parameters
from kimia_infer.api.request import Deadline, Request, Stopwatch
from kimia_infer.audio.files import SAMPLE_RATE, AudioError, load_audio
from kimia_infer.data.parts import cut
from kimia_infer.engine.repetition import RepetitionGuard
from kimia_infer.evaluation.items import Item
from kimia_infer.layers.sampler import SeededRandomness
from kimia_infer.models.kimi_audio.prompt import parse_messages
from kimia_infer.utils.errors import RequestError

AHEAD = 4
"""Items whose recordings may be in memory before their turn."""


@dataclass(frozen=True)
class Finished:
    """The outcome of an item, and the seconds from its turn to its end, including loading."""

    item: Item
    seconds: float
    outcome: Completion | RequestError


@dataclass(frozen=True)
class Turn:
    """An item that is next, and its recordings by message, float32 [samples] at 16 kHz.

    ``started`` is when its turn began, less the time of loading. Instead of recordings there is
    the error if one cannot be used.
    """

    item: Item
    started: float
    waves: dict[int, np.ndarray] | AudioError

    def request(self, options: Parameters, deadline: Deadline) -> Request:
        """The request. Raises RequestError."""
        if isinstance(self.waves, AudioError):
            raise self.waves
        return Request(
            parse_messages(self.item.messages),
            self.waves,
            options,
            SeededRandomness(options.seed),
            deadline,
            Stopwatch(),
            RepetitionGuard() if options.stop_repetition else None,
        )

    def finish(self, outcome: Completion | RequestError) -> Finished:
        return Finished(self.item, time.perf_counter() - self.started, outcome)


def answer_items(
    items: Sequence[Item], model: KimiAudio, options: Parameters, batch_size: int
) -> Generator[Finished]:
    """Answer items, up to ``batch_size`` at a time, and yield each as it ends.

    The order is that of ``items`` if ``batch_size`` is 1. The outcome of an item that is refused
    is its error; other failures are raised. Closing the iterator stops the loading, and what is
    being answered.
    """
    under_way: dict[Future[Completion | RequestError], tuple[Turn, Deadline]] = {}
    pool = ThreadPoolExecutor(batch_size, "answers")
    with contextlib.closing(load_ahead(items, options.max_audio_seconds)) as turns:
        try:
            while True:
                while len(under_way) < batch_size and (turn := next(turns, None)) is not None:
                    deadline = Deadline(options.timeout_seconds)
                    answer = pool.submit(_answer, turn, model, options, deadline)
                    under_way[answer] = turn, deadline
                if not under_way:
                    return
                for answer in wait(under_way, return_when=FIRST_COMPLETED).done:
                    turn, _ = under_way.pop(answer)
                    yield turn.finish(answer.result())
        finally:
            for _, deadline in under_way.values():
                deadline.cancel()
            pool.shutdown()


def load_ahead(items: Sequence[Item], max_seconds: float) -> Generator[Turn]:
    """The turns of items, in order; the recordings of the next few are loaded in a thread.

    A whole recording longer than ``max_seconds`` is refused without decoding the rest. Closing
    the iterator stops the loading.
    """
    load_whole = functools.lru_cache(1)(load_audio)  # the next item often uses the same file

    def load(item: Item) -> tuple[dict[int, np.ndarray], float]:
        started = time.perf_counter()
        waves = {
            index: load_audio(path, max_seconds)
            if item.span is None
            else cut(load_whole(path), SAMPLE_RATE, item.span, path)
            for index, path in item.recordings.items()
        }
        return waves, time.perf_counter() - started

    waiting: deque[tuple[Item, Future[tuple[dict[int, np.ndarray], float]]]] = deque()
    rest = iter(items)
    pool = ThreadPoolExecutor(1, "recordings")
    try:
        while True:
            while len(waiting) < AHEAD and (item := next(rest, None)) is not None:
                waiting.append((item, pool.submit(load, item)))
            if not waiting:
                return
            item, loaded = waiting.popleft()
            try:
                waves, seconds = loaded.result()
            except AudioError as error:
                waves, seconds = error, 0.0
            yield Turn(item, time.perf_counter() - seconds, waves)
    finally:
        pool.shutdown(cancel_futures=True)


def _answer(
    turn: Turn, model: KimiAudio, options: Parameters, deadline: Deadline
) -> Completion | RequestError:
    try:
        *_, completion = model.begin(turn.request(options, deadline)).all_events()
    except RequestError as error:
        return error
    assert isinstance(completion, Completion)
    return completion
