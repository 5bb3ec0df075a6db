"""One answer on its way: generation, and the text and speech that come of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from kimia_infer.api.events import AudioChunk, Completion, Stopwatch, TextDelta
from kimia_infer.api.limits import Deadline
from kimia_infer.api.notes import missing_speech, silent_inputs, silent_speech
from kimia_infer.api.parameters import Parameters
from kimia_infer.audio.mel import Voice
from kimia_infer.engine.decode import Generation, Progress
from kimia_infer.engine.repetition import RepetitionGuard
from kimia_infer.engine.speech import SpeechPipeline
from kimia_infer.layers.sampler import Randomness
from kimia_infer.models.kimi_audio.prompt import Message
from kimia_infer.models.kimi_audio.text_tokenizer import TextStream

SAMPLE_RATE = 24_000
# A chunk is handed out at a look; the first one must not wait for long.
FIRST_SOUND_INTERVAL = 2

OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class Request:
    """A chat to answer, with its sounds loaded, float32 [samples] at 16 kHz by message.

    ``guard`` stops a text that repeats itself, None lets it go on. ``on_step`` is called with
    (steps done, step limit) and may raise to stop. ``voice`` is the one to speak in.
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
    _parts: list[str] = field(default_factory=list)
    _waves: list[Tensor] = field(default_factory=list)

    def events(self) -> Iterator[TextDelta | AudioChunk]:
        """Text and sound as they come. No step is launched once the iterator is closed."""
        request, generation, speech = self.request, self.generation, self.speech
        run = generation.run()
        try:
            if speech is not None:
                generation.poll_by(generation.delay + speech.missing())
            for progress in _timed(run, request.clock):
                if request.on_step is not None:
                    request.on_step(progress.steps, generation.max_steps)
                yield from self._read_text(progress)
                ended = progress.finished or self._loops
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

    def _read_text(self, progress: Progress) -> Iterator[TextDelta]:
        ids, guard = progress.text_ids, self.request.guard
        if guard is not None:
            ids = guard.push(ids) + (guard.finish() if progress.finished else [])
        delta = self.text.push([i for i in ids if i < self.token_offset])
        # A text that is cut may end within a character, which is left out.
        if progress.finished and not self._loops:
            delta += self.text.finish()
        if delta:
            self.request.clock.first("first_text")
            self._parts.append(delta)
            yield TextDelta(delta)

    def _read_codes(
        self, speech: SpeechPipeline, progress: Progress, ended: bool
    ) -> Iterator[AudioChunk]:
        generation = self.generation
        speech.feed(self._codes(progress.audio_ids))
        ahead = generation.launched - progress.steps
        generation.poll_by(progress.steps + speech.missing(ahead))
        if speech.busy and not self._waves:
            generation.poll_by(generation.launched + FIRST_SOUND_INTERVAL)
        if ended:
            speech.finish()
        for wav in speech.rest() if ended else speech.ready():
            self.request.clock.first("first_audio")
            self._waves.append(wav)
            yield AudioChunk(wav)
            if speech.busy:
                self.request.deadline.check()

    @property
    def _loops(self) -> bool:
        guard = self.request.guard
        return guard is not None and guard.repetition is not None

    def _codes(self, audio_ids: Sequence[int]) -> list[int]:
        """Speech codes among ids of the audio track; as published, other ids are left out."""
        return [i - self.token_offset for i in audio_ids if i >= self.token_offset]

    def completion(self) -> Completion:
        """The whole answer, once all events are read."""
        generation, metrics = self.generation, self.request.clock.metrics
        notes = silent_inputs(self.request.waves)
        codes, text_ids = self._codes(generation.audio_ids), generation.text_ids
        stop_reason = "end" if generation.ended else "limit"
        guard = self.request.guard
        if self._loops and guard is not None and (repetition := guard.repetition) is not None:
            stop_reason = "repetition"
            copies = (len(text_ids) - repetition.keep) // repetition.unit
            text_ids = text_ids[: repetition.keep]
            notes.append(
                f"the text repeated its last {repetition.unit} tokens for ever; it was stopped, "
                f"and {copies} copies were cut off"
            )
        wav = torch.cat(self._waves)[None] if self._waves else None
        reason = None
        if wav is not None and self.speech is not None:
            level, silent = silent_speech(wav[0], SAMPLE_RATE)
            notes += silent
            metrics["detokenizer_seconds"] = self.speech.seconds
            metrics["output_audio_seconds"] = wav.shape[1] / SAMPLE_RATE
            metrics["output_level_dbfs"] = round(level, 1)
        elif self.speech is not None:
            ids, delay = len(generation.audio_ids), generation.delay
            reason = missing_speech(generation.steps, ids, delay, generation.ended)
        metrics |= {
            "decode_steps": generation.steps,
            "text_tokens": len(text_ids),
            "speech_codes": len(codes),
            "stop_reason": stop_reason,
            "total_seconds": time.perf_counter() - self.request.clock.started,
        }
        text = "".join(self._parts)
        return Completion(wav, text, text_ids, generation.audio_ids, codes, metrics, reason, notes)


def _timed(run: Iterator[Progress], clock: Stopwatch) -> Iterator[Progress]:
    """``run`` with the time it takes noted: its first look as prefill, the others as decode."""
    stage = "prefill"
    while True:
        with clock.timed(stage):
            progress = next(run, None)
        if progress is None:
            return
        yield progress
        stage = "decode"
