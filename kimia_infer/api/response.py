"""One answer on its way: text and speech from the ids that the model generates."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from kimia_infer.api.events import AudioChunk, Completion, Event, Metrics, TextDelta
from kimia_infer.api.parameters import Parameters
from kimia_infer.api.stopping import StopText
from kimia_infer.audio.files import (
    SAMPLE_RATE,
    SILENCE_DBFS,
    Note,
    is_silent,
    loudest_dbfs,
    silence_of,
)
from kimia_infer.engine.generation import Generation, Step, Task
from kimia_infer.engine.repetition import RepetitionGuard
from kimia_infer.engine.scheduler import Scheduler
from kimia_infer.layers.sampler import Randomness
from kimia_infer.models.kimi_audio.detokenizer import Voice
from kimia_infer.models.kimi_audio.prompt import Message
from kimia_infer.models.kimi_audio.text_tokenizer import TextStream
from kimia_infer.utils.errors import RequestCancelled, RequestTimeout

OnStep = Callable[[int, int], None]
Item = TypeVar("Item")


class Stopwatch:
    """Collects metrics; seconds are by the host's clock."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.metrics: Metrics = {}

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the duration of the block to ``<stage>_seconds``."""
        start = time.perf_counter()
        yield
        name = f"{stage}_seconds"
        self.metrics[name] = self.metrics.get(name, 0.0) + time.perf_counter() - start

    def timing(self, stage: str, items: Iterable[Item]) -> Iterator[Item]:
        """``items``, with the time that each took to come added to ``<stage>_seconds``."""
        rest = iter(items)
        while True:
            with self.timed(stage):
                item = next(rest, None)
            if item is None:
                return
            yield item

    def first(self, name: str) -> None:
        """Record the time since the beginning, once."""
        self.metrics.setdefault(f"{name}_seconds", time.perf_counter() - self.started)


class Deadline:
    """The end of the time that a request may take, counted from now on; None for no limit.

    Any thread may end the request earlier with :meth:`cancel`.
    """

    def __init__(self, seconds: float | None):
        self.seconds = seconds
        self._end = math.inf if seconds is None else time.monotonic() + seconds
        self._cancelled = False

    def cancel(self) -> None:
        """Let every later check raise RequestCancelled."""
        self._cancelled = True

    def check(self) -> None:
        """Raise RequestCancelled once cancelled, and RequestTimeout once the time is over."""
        if self._cancelled:
            raise RequestCancelled("the request was cancelled")
        if time.monotonic() > self._end:
            raise RequestTimeout(
                f"timeout_seconds: the answer was not complete within {self.seconds:g} s; allow "
                "more time, or ask for less (max_new_tokens, shorter audio or text)"
            )


@dataclass(frozen=True)
class Request:
    """A chat to answer, with its audio loaded: float32 [samples] at 16 kHz by message.

    ``guard`` stops a text that repeats itself, None does not. ``on_step`` is called with (steps
    done, step limit) as they become known and may raise to stop. ``voice`` is the reference voice
    of the speech. ``notes`` are what was noted while the audio was read. The text ends before the
    first of the sequences ``stop``.
    """

    messages: Sequence[Message]
    waves: Mapping[int, np.ndarray]
    options: Parameters
    randomness: Randomness
    deadline: Deadline
    clock: Stopwatch
    guard: RepetitionGuard | None = None
    on_step: OnStep | None = None
    voice: Voice | None = None
    notes: Sequence[str] = ()
    stop: Sequence[str] = ()


@dataclass
class Response:
    """What the engine makes of a request, as events.

    Ids below ``token_offset`` are text.
    """

    request: Request
    task: Task
    scheduler: Scheduler
    text: TextStream
    token_offset: int
    sample_rate: int
    _deltas: list[str] = field(default_factory=list)
    _waves: list[Tensor] = field(default_factory=list)
    _stop: StopText = field(init=False)

    def __post_init__(self) -> None:
        self._stop = StopText(self.request.stop)

    def events(self) -> Iterator[TextDelta | AudioChunk]:
        """Text and speech as they become known. Closing the iterator stops generation."""
        try:
            while not self._stop.found and (event := self.task.events.get()) is not None:
                if isinstance(event, BaseException):
                    raise event
                if isinstance(event, Step):
                    yield from self._read_text(event)
                else:
                    self.request.clock.first("first_audio")
                    self._waves.append(event)
                    yield AudioChunk(event, self.sample_rate)
        finally:
            self.close()

    def all_events(self) -> Iterator[Event]:
        """:meth:`events`, then the :meth:`completion`."""
        yield from self.events()
        yield self.completion()

    def close(self) -> None:
        """Let go of the request; it is stopped unless it is complete."""
        if not self.task.ended:
            self.scheduler.abandon(self.task)

    def _read_text(self, step: Step) -> Iterator[TextDelta]:
        """The text that new ids add."""
        if self.request.on_step is not None:
            self.request.on_step(step.steps, self.task.max_steps)
        delta = self.text.push([i for i in step.text_ids if i < self.token_offset])
        # A text that is cut may end within a character, which is left out.
        if step.finished and not self.task.repeats:
            delta += self.text.finish()
        delta = self._stop.push(delta)
        if step.finished:
            delta += self._stop.finish()
        if delta:
            self.request.clock.first("first_text")
            self._deltas.append(delta)
            yield TextDelta(delta)

    def completion(self) -> Completion:
        """The whole answer, once all events are read."""
        generation, metrics = self.task.generation, self.request.clock.metrics
        assert generation is not None, "it is complete"
        speaks = self.task.speech is not None
        notes = [*self.request.notes, *silent_inputs(self.request.waves)]
        codes, text_ids = self.task.codes_of(generation.audio_ids), generation.text_ids
        stop_reason = "end" if generation.ended else "limit"
        if self._stop.found:
            stop_reason = "stop"
        guard = self.task.guard
        if guard is not None and (repetition := guard.repetition) is not None:
            stop_reason = "repetition"
            copies = (len(text_ids) - repetition.keep) // repetition.unit
            text_ids = text_ids[: repetition.keep]
            notes.append(
                f"the text repeated its last {repetition.unit} tokens endlessly; it was stopped, "
                f"and {copies} copies were cut off"
            )
        if speaks and not text_ids:
            notes.append("the answer has no text: the model ended it before the first word")
        wav = torch.cat(self._waves)[None] if self._waves else None
        reason = None
        if wav is not None:
            level = loudest_dbfs(wav[0].numpy(), self.sample_rate)
            if is_silent(level):
                notes.append(
                    f"the speech is silent ({level:.0f} dBFS at its loudest, below "
                    f"{SILENCE_DBFS:.0f}); another seed or temperature may give another answer"
                )
            metrics["output_audio_seconds"] = wav.shape[1] / self.sample_rate
            metrics["output_level_dbfs"] = round(level, 1)
        elif speaks:
            reason = missing_speech(generation)
        metrics |= {f"{stage}_seconds": spent for stage, spent in self.task.seconds.items()}
        metrics |= {
            "decode_steps": generation.steps,
            "text_tokens": len(text_ids),
            "speech_codes": len(codes),
            "stop_reason": stop_reason,
            "total_seconds": time.perf_counter() - self.request.clock.started,
        }
        return Completion(
            wav,
            self.sample_rate,
            "".join(self._deltas),
            text_ids,
            generation.audio_ids,
            codes,
            metrics,
            reason,
            notes,
        )


def named(where: str, note: Note) -> Note:
    """``note`` for sentences that begin with ``where``."""
    return lambda text: note(f"{where}{text}")


def silent_inputs(waves: Mapping[int, np.ndarray]) -> list[str]:
    """A note for every silent recording [samples] at 16 kHz, by the message it belongs to."""
    found = {index: silence_of(wave, SAMPLE_RATE) for index, wave in waves.items()}
    return [f"chats[{i}].content: the audio {silence}" for i, silence in found.items() if silence]


def missing_speech(generation: Generation) -> str:
    """Why an answer without speech codes has none."""
    ids = len(generation.audio_ids)  # without the delay, end token included
    if not ids:
        return (
            f"no speech: the answer stopped after {generation.steps} steps, and speech begins at "
            f"step {generation.delay + 1}; allow more (max_new_tokens, or a shorter prompt)"
        )
    if generation.ended and ids == 1:
        return "no speech: the model ended its speech before the first speech code"
    return f"no speech: none of the {ids} ids in the model's audio track is a speech code"
