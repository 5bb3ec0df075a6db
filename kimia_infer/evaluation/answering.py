"""Answers of the model to items: one at a time, or several in a batch that is always refilled.

Recordings are loaded ahead in a thread while the model answers.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from kimia_infer.api.engine import is_out_of_memory, surviving_out_of_memory
from kimia_infer.api.events import Completion
from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.parameters import Parameters
from kimia_infer.api.response import Deadline, Request, Response, Stopwatch
from kimia_infer.audio.files import SAMPLE_RATE, AudioError, load_audio
from kimia_infer.data.parts import cut
from kimia_infer.engine.batch import TextBatch
from kimia_infer.engine.decode import Progress
from kimia_infer.engine.repetition import RepetitionGuard
from kimia_infer.evaluation.items import Item
from kimia_infer.layers.sampler import SeededRandomness
from kimia_infer.models.kimi_audio.prompt import parse_messages
from kimia_infer.utils.errors import ConfigurationError, RequestError, RequestOutOfMemory
from kimia_infer.utils.graphs import Graphs, graphs_for

AHEAD = 4
"""Items whose recordings may be in memory before their turn."""

log = logging.getLogger(__name__)

T = TypeVar("T")


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

    def request(self, options: Parameters) -> Request:
        """The request, whose time limit begins now. Raises RequestError."""
        if isinstance(self.waves, AudioError):
            raise self.waves
        return Request(
            parse_messages(self.item.messages),
            self.waves,
            options,
            SeededRandomness(options.seed),
            Deadline(options.timeout_seconds),
            Stopwatch(),
            RepetitionGuard() if options.stop_repetition else None,
        )

    def finish(self, outcome: Completion | RequestError) -> Finished:
        return Finished(self.item, time.perf_counter() - self.started, outcome)


def answer_items(
    items: Sequence[Item],
    model: KimiAudio,
    options: Parameters,
    batch_size: int,
    make_graphs: Callable[[torch.device], Graphs] = graphs_for,
) -> Generator[Finished]:
    """Answer items, up to ``batch_size`` at a time, and yield each as it ends.

    The order is that of ``items`` if ``batch_size`` is 1. The outcome of an item that is refused
    is its error; other failures are raised. Closing the iterator stops the loading.

    Raises:
        ConfigurationError: there is no memory for so many items at a time.
    """
    with contextlib.closing(load_ahead(items, options.max_audio_seconds)) as turns:
        if batch_size > 1:
            yield from answer_together(turns, model, options, batch_size, make_graphs)
            return
        for turn in turns:
            yield turn.finish(_answer(turn, model, options))


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


@torch.inference_mode()
def _answer(turn: Turn, model: KimiAudio, options: Parameters) -> Completion | RequestError:
    try:
        *_, completion = surviving_out_of_memory(model.answer(turn.request(options)))
    except RequestError as error:
        return error
    assert isinstance(completion, Completion)
    return completion


def answer_together(
    turns: Iterator[Turn],
    model: KimiAudio,
    options: Parameters,
    size: int,
    make_graphs: Callable[[torch.device], Graphs],
) -> Iterator[Finished]:
    """Answer up to ``size`` items at a time, in text, and yield each as it ends.

    Prompts are encoded one by one; all running items then advance by one token a step, and the
    next item takes the slot of one that ends. After a step that lacked memory, all running items
    are refused.

    Raises:
        ConfigurationError: there is no memory for so many.
    """
    batch = _make_batch(model, options, size, make_graphs)
    log.info("%d items at a time, %d bytes for each", size, batch.slot_bytes)
    running: dict[int, tuple[Turn, Response]] = {}
    while True:
        while not batch.full and (turn := next(turns, None)) is not None:
            try:
                slot, response = _guarded(functools.partial(_prefill, turn, model, batch, options))
            except RequestError as error:
                yield turn.finish(error)
            else:
                running[slot] = turn, response
        if not running:
            return
        refused: list[Finished] = []
        try:
            polled = _guarded(batch.advance)
        except RequestOutOfMemory as error:
            refusal = RequestOutOfMemory(
                f"while {len(running)} items were answered together: {error}. Use a smaller "
                "--batch-size"
            )
            polled, refused = [], [turn.finish(refusal) for turn, _ in running.values()]
        if refused:  # no longer in the handler, whose error refers to the batch
            running.clear()
            del batch  # first, so that there is room for the next one
            batch = _make_batch(model, options, size, make_graphs)
            yield from refused
        for slot, progress in polled:
            turn, response = running[slot]
            if (outcome := _outcome(response, progress)) is not None:
                batch.release(slot)
                del running[slot]
                yield turn.finish(outcome)


def _make_batch(
    model: KimiAudio,
    options: Parameters,
    size: int,
    make_graphs: Callable[[torch.device], Graphs],
) -> TextBatch:
    try:
        return TextBatch(model.decoder, size, model.poll_interval, make_graphs)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigurationError(
            f"batch size: there is no memory for {size} answers at a time ({error}); "
            "use a smaller --batch-size"
        ) from error


@torch.inference_mode()
def _prefill(
    turn: Turn, model: KimiAudio, batch: TextBatch, options: Parameters
) -> tuple[int, Response]:
    """Read the prompt of an item into a free slot."""
    response = model.begin(turn.request(options))
    return batch.begin(response.generation), response


def _guarded(compute: Callable[[], T]) -> T:
    """The result of ``compute``; RequestOutOfMemory if it lacks memory, which is then freed."""

    def once() -> Generator[T]:
        yield compute()

    (result,) = surviving_out_of_memory(once())
    return result


def _outcome(response: Response, progress: Progress) -> Completion | RequestError | None:
    """Read new tokens: the answer if it is complete, the error if it is out of time, or None."""
    for _ in response.read_text(progress):
        pass
    try:
        if progress.finished or response.repeats:
            return response.completion()
        response.request.deadline.check()
    except RequestError as error:
        return error
    return None
