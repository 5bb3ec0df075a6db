"""Several items answered together: encoded one by one, then generated in one batch."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from kimia_infer.api.events import Completion, Stopwatch
from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.limits import Deadline, is_out_of_memory, surviving_out_of_memory
from kimia_infer.api.parameters import Parameters
from kimia_infer.api.response import Request, Response
from kimia_infer.engine.batch import Batch
from kimia_infer.engine.decode import Progress
from kimia_infer.engine.repetition import RepetitionGuard
from kimia_infer.evaluation.items import EvaluationError, Item
from kimia_infer.evaluation.sounds import Loaded
from kimia_infer.layers.sampler import SeededRandomness
from kimia_infer.models.kimi_audio.messages import parse_messages
from kimia_infer.models.kimi_audio.text_tokenizer import TextStream
from kimia_infer.utils.errors import RequestError, RequestOutOfMemory
from kimia_infer.utils.graphs import Graphs, graphs_for

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """What became of an item, and the seconds from its turn on, with the loading of its sounds."""

    item: Item
    seconds: float
    outcome: Completion | RequestError


def request_of(item: Item, loaded: Loaded, options: Parameters) -> Request:
    """The request of an item whose turn it is; raises RequestError where it cannot be made."""
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


class _Reader(Response):
    """A response whose generation is advanced from outside."""

    def read(self, progress: Progress) -> bool:
        """Take what is new; whether the answer is complete. Raises RequestTimeout."""
        for _ in self._read_text(progress):
            pass
        complete = progress.finished or self._loops
        if not complete:
            self.request.deadline.check()
        return complete


@dataclass(frozen=True)
class _Turn:
    """An item that is being answered; ``started`` is put back by what loading its sounds took."""

    item: Item
    started: float
    response: _Reader

    def end(self, outcome: Completion | RequestError) -> Answer:
        return Answer(self.item, time.perf_counter() - self.started, outcome)


class Together:
    """Answers up to ``size`` items at a time with ``model``, in text.

    Raises EvaluationError where there is no memory for so many.
    """

    def __init__(
        self,
        model: KimiAudio,
        options: Parameters,
        size: int,
        make_graphs: Callable[[torch.device], Graphs] = graphs_for,
    ):
        self.model, self.options, self.size = model, options, size
        self._make_graphs = make_graphs
        self._turns: dict[int, _Turn] = {}
        self._batch = self._make_batch()
        log.info("%d items at a time, %d bytes for each", size, self._batch.slot_bytes)

    def answers(self, loaded_items: Iterator[tuple[Item, Loaded]]) -> Iterator[Answer]:
        """The answers in the order in which they are complete; the next item takes the place."""
        while True:
            while not self._batch.full and (following := next(loaded_items, None)) is not None:
                refusal = self._begin(*following)
                if refusal is not None:
                    yield refusal
            if not self._turns:
                return
            yield from self._advance()

    def _make_batch(self) -> Batch:
        model, sampling = self.model, self.options.sampling.text
        try:
            return Batch(
                model.decoder, self.size, sampling, model.check_interval, self._make_graphs
            )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise EvaluationError(
                f"batch size: there is no memory for {self.size} answers at a time ({error}); "
                "name a smaller --batch-size"
            ) from error

    def _begin(self, item: Item, loaded: Loaded) -> Answer | None:
        """Encode an item and read its prompt into a free slot; its answer if it is refused."""
        started = time.perf_counter() - loaded.seconds
        try:
            ((slot, response),) = surviving_out_of_memory(self._begun(item, loaded))
        except RequestError as error:
            return Answer(item, time.perf_counter() - started, error)
        self._turns[slot] = _Turn(item, started, response)
        return None

    @torch.inference_mode()
    def _begun(self, item: Item, loaded: Loaded) -> Iterator[tuple[int, _Reader]]:
        model, request = self.model, request_of(item, loaded, self.options)
        prompt, features = model.encoder.encode(
            request.messages, request.waves, request.options, request.clock
        )
        request.deadline.check()
        generation = model.generation(prompt, features, request.options, request.randomness)
        text = TextStream(model.text_tokenizer)
        response = _Reader(request, generation, text, None, model.kimia_token_offset)
        yield self._batch.begin(generation), response

    def _advance(self) -> Iterator[Answer]:
        """Launch steps; the items that are complete then, or out of time."""
        try:
            looks = list(surviving_out_of_memory(self._looks()))
        except RequestOutOfMemory as error:
            yield from self._give_up(error)
            return
        for slot, progress in looks:
            turn = self._turns[slot]
            try:
                if not turn.response.read(progress):
                    continue
                outcome = turn.response.completion()
            except RequestError as error:
                outcome = error
            self._batch.release(slot)
            del self._turns[slot]
            yield turn.end(outcome)

    def _looks(self) -> Iterator[tuple[int, Progress]]:
        yield from self._batch.advance()

    def _give_up(self, error: RequestOutOfMemory) -> list[Answer]:
        """Refuse what is being answered, as a step has failed, and begin with an empty batch."""
        refusal = RequestOutOfMemory(
            f"while {len(self._turns)} items were answered together: {error}. A smaller "
            "--batch-size needs less"
        )
        answers = [turn.end(refusal) for turn in self._turns.values()]
        self._turns.clear()
        del self._batch  # first, so that there is room for the next one
        self._batch = self._make_batch()
        return answers
