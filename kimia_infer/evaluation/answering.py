"""Answers of the model to items: one at a time, or several in a batch that is always refilled.

Recordings are loaded ahead in a thread while the model answers.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from kimia_infer.api.engine import is_out_of_memory, surviving_out_of_memory
from kimia_infer.api.events import Completion
from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.parameters import Parameters
from kimia_infer.api.response import Deadline, Request, Response, Stopwatch
from kimia_infer.audio.files import SAMPLE_RATE, AudioError, load_audio
from kimia_infer.engine.batch import Batch
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


@dataclass(frozen=True)
class Loaded:
    """The recordings of an item by message, float32 [samples] at 16 kHz.

    ``seconds`` is the time that loading took; ``error`` is set if a recording cannot be used.
    """

    waves: dict[int, np.ndarray]
    seconds: float
    error: AudioError | None = None


@dataclass(frozen=True)
class Finished:
    """The outcome of an item, and the seconds from its turn to its end, including loading."""

    item: Item
    seconds: float
    outcome: Completion | RequestError


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
    with contextlib.closing(load_ahead(items, options.max_audio_seconds)) as loaded:
        if batch_size == 1:
            yield from _one_at_a_time(loaded, model, options)
        else:
            yield from Batching(model, options, batch_size, make_graphs).answers(loaded)


def load_ahead(items: Sequence[Item], max_seconds: float) -> Generator[tuple[Item, Loaded]]:
    """Every item with its recordings, in order; the next few are loaded in a thread.

    A whole recording longer than ``max_seconds`` is refused without decoding the rest. Closing
    the iterator stops the loading.
    """
    loader, waiting = _Loader(max_seconds), deque[tuple[Item, Future[Loaded]]]()
    rest = iter(items)
    pool = ThreadPoolExecutor(1, "recordings")  # one, as the loader is not thread-safe
    try:
        while True:
            while len(waiting) < AHEAD and (item := next(rest, None)) is not None:
                waiting.append((item, pool.submit(loader.load, item)))
            if not waiting:
                return
            item, future = waiting.popleft()
            yield item, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


class _Loader:
    """Loads recordings. The last file that was cut is kept, as the next item often uses it."""

    def __init__(self, max_seconds: float):
        self.max_seconds = max_seconds
        self._cut: tuple[str, np.ndarray] | None = None

    def load(self, item: Item) -> Loaded:
        started = time.perf_counter()
        waves: dict[int, np.ndarray] = {}
        error = None
        try:
            for index, path in item.recordings.items():
                waves[index] = (
                    load_audio(path, self.max_seconds)
                    if item.span is None
                    else self._excerpt(path, *item.span)
                )
        except AudioError as reason:
            error = reason
        return Loaded(waves, time.perf_counter() - started, error)

    def _excerpt(self, path: str, start: float, end: float) -> np.ndarray:
        if self._cut is None or self._cut[0] != path:
            self._cut = None  # freed before the next file is loaded
            self._cut = path, load_audio(path)
        wave = self._cut[1]
        excerpt = wave[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)]
        if not excerpt.size:
            length = len(wave) / SAMPLE_RATE
            raise AudioError(f"{path}: ends at {length:.2f} s, before {start:g} to {end:g} s")
        return excerpt


def _request(item: Item, loaded: Loaded, options: Parameters) -> Request:
    """The request of an item, whose time limit begins now. Raises RequestError."""
    if loaded.error is not None:
        raise loaded.error
    return Request(
        parse_messages(item.messages),
        loaded.waves,
        options,
        SeededRandomness(options.seed),
        Deadline(options.timeout_seconds),
        Stopwatch(),
        RepetitionGuard() if options.stop_repetition else None,
    )


def _one_at_a_time(
    loaded_items: Iterator[tuple[Item, Loaded]], model: KimiAudio, options: Parameters
) -> Iterator[Finished]:
    for item, loaded in loaded_items:
        started = time.perf_counter()
        outcome = _answer(model, item, loaded, options)
        yield Finished(item, loaded.seconds + time.perf_counter() - started, outcome)


@torch.inference_mode()
def _answer(
    model: KimiAudio, item: Item, loaded: Loaded, options: Parameters
) -> Completion | RequestError:
    try:
        request = _request(item, loaded, options)
        *_, completion = surviving_out_of_memory(model.answer(request))
        assert isinstance(completion, Completion)
    except RequestError as error:
        return error
    return completion


def _read(response: Response, progress: Progress) -> bool:
    """Read new tokens; whether the answer is complete. Raises RequestTimeout."""
    for _ in response.read_text(progress):
        pass
    complete = progress.finished or response.repeats
    if not complete:
        response.request.deadline.check()
    return complete


@dataclass(frozen=True)
class _Running:
    """An item in a slot of the batch; ``started`` includes the time of loading."""

    item: Item
    started: float
    response: Response

    def finish(self, outcome: Completion | RequestError) -> Finished:
        return Finished(self.item, time.perf_counter() - self.started, outcome)


class Batching:
    """Answers up to ``size`` items at a time with ``model``, in text.

    Prompts are encoded one by one; all running items then advance by one token a step. Raises
    ConfigurationError if there is no memory for so many.
    """

    def __init__(
        self,
        model: KimiAudio,
        options: Parameters,
        size: int,
        make_graphs: Callable[[torch.device], Graphs],
    ):
        self.model, self.options, self.size = model, options, size
        self._make_graphs = make_graphs
        self._running: dict[int, _Running] = {}
        self._batch = self._make_batch()
        log.info("%d items at a time, %d bytes for each", size, self._batch.slot_bytes)

    def answers(self, loaded_items: Iterator[tuple[Item, Loaded]]) -> Iterator[Finished]:
        """Items in the order in which they end; the next item takes the free slot."""
        while True:
            while not self._batch.full and (following := next(loaded_items, None)) is not None:
                refused = self._begin(*following)
                if refused is not None:
                    yield refused
            if not self._running:
                return
            yield from self._advance()

    def _make_batch(self) -> Batch:
        model, sampling = self.model, self.options.sampling.text
        try:
            return Batch(model.decoder, self.size, sampling, model.poll_interval, self._make_graphs)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise ConfigurationError(
                f"batch size: there is no memory for {self.size} answers at a time ({error}); "
                "use a smaller --batch-size"
            ) from error

    def _begin(self, item: Item, loaded: Loaded) -> Finished | None:
        """Read the prompt of an item into a free slot; the outcome if it is refused."""
        started = time.perf_counter() - loaded.seconds
        try:
            ((slot, response),) = surviving_out_of_memory(self._prefill(item, loaded))
        except RequestError as error:
            return Finished(item, time.perf_counter() - started, error)
        self._running[slot] = _Running(item, started, response)
        return None

    @torch.inference_mode()
    def _prefill(self, item: Item, loaded: Loaded) -> Generator[tuple[int, Response]]:
        response = self.model.begin(_request(item, loaded, self.options))
        yield self._batch.begin(response.generation), response

    def _advance(self) -> Iterator[Finished]:
        """Launch steps; the items that are complete then, or out of time."""
        try:
            found = list(surviving_out_of_memory(self._poll()))
        except RequestOutOfMemory as error:
            yield from self._abandon(error)
            return
        for slot, progress in found:
            running = self._running[slot]
            try:
                if not _read(running.response, progress):
                    continue
                outcome: Completion | RequestError = running.response.completion()
            except RequestError as error:
                outcome = error
            self._batch.release(slot)
            del self._running[slot]
            yield running.finish(outcome)

    def _poll(self) -> Generator[tuple[int, Progress]]:
        yield from self._batch.advance()

    def _abandon(self, error: RequestOutOfMemory) -> list[Finished]:
        """Refuse all running items, as a step has failed, and start with an empty batch."""
        refusal = RequestOutOfMemory(
            f"while {len(self._running)} items were answered together: {error}. A smaller "
            "--batch-size needs less"
        )
        refused = [running.finish(refusal) for running in self._running.values()]
        self._running.clear()
        del self._batch  # first, so that there is room for the next one
        self._batch = self._make_batch()
        return refused
