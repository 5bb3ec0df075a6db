"""One answer on its way: text and speech from the ids that the model generates."""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from kimia_infer.api.events import AudioChunk, Completion, Metrics, TextDelta
from kimia_infer.api.parameters import Parameters
from kimia_infer.audio.files import (
    SAMPLE_RATE,
    SILENCE_DBFS,
    Note,
    is_silent,
    loudest_dbfs,
    silence_of,
)
from kimia_infer.engine.decode import Generation, Progress
from kimia_infer.engine.repetition import RepetitionGuard
from kimia_infer.layers.sampler import Randomness
from kimia_infer.models.kimi_audio.detokenizer import (
    FIRST_CHUNKS,
    Detokenizer,
    Noise,
    SpeechStream,
    Voice,
)
from kimia_infer.models.kimi_audio.prompt import Message
from kimia_infer.models.kimi_audio.text_tokenizer import TextStream
from kimia_infer.utils.errors import RequestCancelled, RequestTimeout
from kimia_infer.utils.graphs import side_thread

FIRST_SPEECH_INTERVAL = 2
"""Steps between polls while the first chunk is synthesized, so that it is not kept waiting."""

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
    done, step limit) and may raise to stop. ``voice`` is the reference voice of the speech.
    ``notes`` are what was noted while the audio was read.
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


@dataclass
class Response:
    """Runs a generation and turns its ids into events.

    ``speech`` is None for an answer in text. Ids below ``token_offset`` are text, the others
    speech codes.
    """

    request: Request
    generation: Generation
    text: TextStream
    speech: SpeechPipeline | None
    token_offset: int
    sample_rate: int
    _deltas: list[str] = field(default_factory=list)
    _waves: list[Tensor] = field(default_factory=list)

    def events(self) -> Iterator[TextDelta | AudioChunk]:
        """Text and speech as they become known. Closing the iterator stops generation."""
        request, generation, speech = self.request, self.generation, self.speech
        run = generation.run()
        try:
            if speech is not None:
                generation.poll_by(generation.delay + speech.missing())
            # Up to the first poll it is prefill.
            first = request.clock.timing("prefill", itertools.islice(run, 1))
            for progress in itertools.chain(first, request.clock.timing("decode", run)):
                if request.on_step is not None:
                    request.on_step(progress.steps, generation.max_steps)
                yield from self.read_text(progress)
                ended = progress.finished or self.repeats
                if not ended:
                    request.deadline.check()
                if speech is not None:
                    yield from self._read_codes(speech, progress, ended)
                if ended:
                    return
        finally:
            run.close()
            if speech is not None:
                speech.close()

    def read_text(self, progress: Progress) -> Iterator[TextDelta]:
        """The text that new ids add."""
        ids, guard = progress.text_ids, self.request.guard
        if guard is not None:
            ids = guard.push(ids) + (guard.finish() if progress.finished else [])
        delta = self.text.push([i for i in ids if i < self.token_offset])
        # A text that is cut may end within a character, which is left out.
        if progress.finished and not self.repeats:
            delta += self.text.finish()
        if delta:
            self.request.clock.first("first_text")
            self._deltas.append(delta)
            yield TextDelta(delta)

    def _read_codes(
        self, speech: SpeechPipeline, progress: Progress, ended: bool
    ) -> Iterator[AudioChunk]:
        generation = self.generation
        speech.feed(self._codes(progress.audio_ids))
        ahead = generation.launched - progress.steps
        generation.poll_by(progress.steps + speech.missing(ahead))
        if speech.busy and not self._waves:
            generation.poll_by(generation.launched + FIRST_SPEECH_INTERVAL)
        if ended:
            speech.finish()
        for wav in speech.rest() if ended else speech.ready():
            self.request.clock.first("first_audio")
            self._waves.append(wav)
            yield AudioChunk(wav, self.sample_rate)
            if speech.busy:
                self.request.deadline.check()

    @property
    def repeats(self) -> bool:
        """Whether the text was stopped because it repeats itself."""
        guard = self.request.guard
        return guard is not None and guard.repetition is not None

    def _codes(self, audio_ids: Sequence[int]) -> list[int]:
        """Speech codes among ids of the audio track; as published, other ids are left out."""
        return [i - self.token_offset for i in audio_ids if i >= self.token_offset]

    def completion(self) -> Completion:
        """The whole answer, once all events are read."""
        generation, metrics = self.generation, self.request.clock.metrics
        notes = [*self.request.notes, *silent_inputs(self.request.waves)]
        codes, text_ids = self._codes(generation.audio_ids), generation.text_ids
        stop_reason = "end" if generation.ended else "limit"
        guard = self.request.guard
        if self.repeats and guard is not None and (repetition := guard.repetition) is not None:
            stop_reason = "repetition"
            copies = (len(text_ids) - repetition.keep) // repetition.unit
            text_ids = text_ids[: repetition.keep]
            notes.append(
                f"the text repeated its last {repetition.unit} tokens endlessly; it was stopped, "
                f"and {copies} copies were cut off"
            )
        if self.speech is not None and not text_ids:
            notes.append("the answer has no text: the model ended it before the first word")
        wav = torch.cat(self._waves)[None] if self._waves else None
        reason = None
        if wav is not None and self.speech is not None:
            level = loudest_dbfs(wav[0].numpy(), self.sample_rate)
            if is_silent(level):
                notes.append(
                    f"the speech is silent ({level:.0f} dBFS at its loudest, below "
                    f"{SILENCE_DBFS:.0f}); another seed or temperature may give another answer"
                )
            metrics["detokenizer_seconds"] = self.speech.seconds
            metrics["output_audio_seconds"] = wav.shape[1] / self.sample_rate
            metrics["output_level_dbfs"] = round(level, 1)
        elif self.speech is not None:
            reason = missing_speech(generation)
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


class SpeechPipeline:
    """Cuts a growing sequence of codes into chunks and synthesizes each.

    A chunk is submitted when the code after it is known, so that the last one can be marked final
    as published. In the ``background``, synthesis runs on a thread beside generation, in the
    detokenizer's CUDA stream; on the CPU, where both would compete for the same cores, within
    :meth:`feed`. ``seconds`` is the time that synthesis has taken so far. ``voice`` is the
    reference voice of all of it.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        noise: Noise,
        preset: str,
        background: bool,
        voice: Voice | None = None,
    ):
        self._detokenizer, self._noise, self._voice = detokenizer, noise, voice
        self._stream: SpeechStream | None = None
        self._failed = False
        self._first_sizes = FIRST_CHUNKS[preset]
        self._usual_size = detokenizer.config.chunk_codes
        self._submitted = 0
        self._pending: list[int] = []
        self._executor: Executor = side_thread() if background else _Inline()
        self._chunks: deque[Future[Tensor]] = deque()
        self.seconds = 0.0

    def feed(self, codes: Sequence[int]) -> None:
        """Take the next codes; synthesize the chunks that they complete."""
        self._pending += codes
        while len(self._pending) > (size := self._size(self._submitted)):
            self._submit(self._pending[:size], final=False)
            self._pending = self._pending[size:]

    def missing(self, ahead: int = 0) -> int:
        """Codes until a chunk can be submitted: the rest of it and the one after it.

        The first such number that is more than ``ahead``.
        """
        chunk = self._submitted
        missing = self._size(chunk) + 1 - len(self._pending)
        while missing <= ahead:
            chunk += 1
            missing += self._size(chunk)
        return missing

    def _size(self, chunk: int) -> int:
        return self._first_sizes[chunk] if chunk < len(self._first_sizes) else self._usual_size

    def finish(self) -> None:
        """There are no more codes: the rest is the final chunk."""
        if self._pending:
            self._submit(self._pending, final=True)

    @property
    def busy(self) -> bool:
        """Whether a chunk was submitted whose waveform has not been taken."""
        return bool(self._chunks)

    def ready(self) -> Iterator[Tensor]:
        """Waveforms float32 [samples], on the CPU, of the chunks that are done."""
        while self._chunks and self._chunks[0].done():
            yield self._chunks.popleft().result()

    def rest(self) -> Iterator[Tensor]:
        """The waveforms of all remaining chunks, waiting for each."""
        while self._chunks:
            yield self._chunks.popleft().result()

    def close(self) -> None:
        """Drop queued chunks and wait for the chunk in progress.

        After a failure the stream is not used again.
        """
        for chunk in self._chunks:
            chunk.cancel()
        wait(self._chunks)
        if self._stream is not None and not self._failed:
            self._stream.close()

    def _submit(self, codes: list[int], final: bool) -> None:
        self._chunks.append(self._executor.submit(self._synthesize, codes, final))
        self._submitted += 1

    def _synthesize(self, codes: list[int], final: bool) -> Tensor:
        start = time.perf_counter()
        # Inference mode is set per thread.
        with torch.inference_mode(), self._detokenizer.graphs.stream():
            wave = self._push(codes, final).cpu()
        self.seconds += time.perf_counter() - start
        return wave

    def _push(self, codes: list[int], final: bool) -> Tensor:
        if self._failed:
            raise RuntimeError("an earlier chunk of this speech has failed")
        self._failed = True  # until this chunk is done
        if self._stream is None:
            self._stream = self._detokenizer.start(self._noise)
            if self._voice is not None:
                self._stream.prefill(*self._voice)
        wave = self._stream.push(codes, final)
        self._failed = False
        return wave


class _Inline(Executor):
    """Runs what is submitted at once, on the caller's thread."""

    def submit(self, function: Callable, /, *arguments: Any, **keywords: Any) -> Future:
        future: Future = Future()
        future.set_result(function(*arguments, **keywords))
        return future
