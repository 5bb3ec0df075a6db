"""One request: its chat is loaded and encoded, and its answer comes as text and speech."""

from __future__ import annotations

import logging
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
from kimia_infer.api.spoken import SpokenAnswer
from kimia_infer.audio.files import (
    SAMPLE_RATE,
    SILENCE_DBFS,
    AudioError,
    AudioTooLong,
    Check,
    Note,
    is_silent,
    load_audio,
    loudest_dbfs,
    silence_of,
)
from kimia_infer.engine.generation import DecodeInput, Generation, OutputType, Step, Task
from kimia_infer.engine.repetition import RepetitionGuard
from kimia_infer.engine.scheduler import Scheduler
from kimia_infer.layers.sampler import Randomness
from kimia_infer.models.kimi_audio.detokenizer import Voice
from kimia_infer.models.kimi_audio.encoders import SpeechCodes, WhisperFeatures, code_count
from kimia_infer.models.kimi_audio.prompt import EncodedMessage, Message, Prompt, PromptBuilder
from kimia_infer.models.kimi_audio.text_tokenizer import StopText, TextStream, TextTokenizer
from kimia_infer.utils.errors import RequestCancelled, RequestTimeout

log = logging.getLogger(__name__)

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
        if self.seconds is not None and time.monotonic() > self._end:
            raise RequestTimeout(self.seconds)


@dataclass(frozen=True)
class Chat:
    """A chat with its audio, float32 [samples] at 16 kHz by message, and the ids of its texts."""

    messages: Sequence[Message]
    waves: Mapping[int, np.ndarray]
    text_ids: Sequence[list[int]]
    output_type: OutputType

    @property
    def unknown_codes(self) -> dict[int, list[int]]:
        """As many codes as each sound will have."""
        return {i: [0] * code_count(len(wave)) for i, wave in self.waves.items()}


@dataclass(frozen=True)
class ChatEncoder:
    """Encodes chats with the tokenizers and encoders of a checkpoint."""

    text_tokenizer: TextTokenizer
    speech_codes: SpeechCodes
    whisper_features: WhisperFeatures
    prompt_builder: PromptBuilder
    device: torch.device

    def load(
        self,
        messages: Sequence[Message],
        options: Parameters,
        clock: Stopwatch,
        note: Note = log.warning,
        check: Check | None = None,
    ) -> dict[int, np.ndarray]:
        """The audio of a chat by message, float32 [samples] at 16 kHz.

        Audio that alone would exceed the budget is refused without decoding the rest. ``note`` and
        ``check`` are those of ``load_audio``; notes begin with the name of the message.
        """
        waves = {}
        with clock.timed("load_audio"):
            for index, message in enumerate(messages):
                if message.audio is None:
                    continue
                where = f"chats[{index}].content: "
                noted = named(where, note)
                try:
                    waves[index] = load_audio(
                        message.audio, options.max_audio_seconds, note=noted, check=check
                    )
                except AudioTooLong as error:
                    raise AudioTooLong(f"{where}{error} ({options.budget_explained})") from error
                except AudioError as error:
                    raise AudioError(f"{where}{error}") from error
        return waves

    def prepare(
        self,
        messages: Sequence[Message],
        waves: Mapping[int, np.ndarray],
        options: Parameters,
        clock: Stopwatch,
    ) -> tuple[Chat, int]:
        """The chat to encode, and the length of its prompt, which is known before.

        A prompt that leaves no budget is refused.
        """
        with clock.timed("prompt"):
            text_ids = [self.text_tokenizer.encode(m.text or "") for m in messages]
            chat = Chat(messages, waves, text_ids, options.output_type)
            codes = chat.unknown_codes
            length = len(self._layout(chat, codes))
            options.step_limit(length)
        clock.metrics |= {
            "input_audio_seconds": sum(len(wave) for wave in waves.values()) / SAMPLE_RATE,
            "prompt_tokens": length,
            "prompt_audio_tokens": sum(map(len, codes.values())),
        }
        return chat, length

    def decode_input(self, prompt: Prompt, features: Tensor | None) -> DecodeInput:
        """A prompt as the language model reads it."""
        return DecodeInput(
            torch.tensor([prompt.audio_ids]).to(self.device),
            torch.tensor([prompt.text_ids]).to(self.device),
            torch.tensor([prompt.is_continuous]).to(self.device),
            features,
        )

    def encode(self, chats: Sequence[Chat]) -> list[DecodeInput]:
        """The prompts of chats, on the device of the language model."""
        return [self.decode_input(*encoded) for encoded in self.encode_all(chats)]

    @torch.inference_mode()
    def encode_all(self, chats: Sequence[Chat]) -> list[tuple[Prompt, Tensor | None]]:
        """The prompts of chats, and the Whisper features [positions, dim] they refer to.

        All sounds are encoded together. Features are launched first and stay on the device while
        the host waits for the codes.
        """
        heard = [self._layout(chat, chat.unknown_codes).feature_messages for chat in chats]
        features = self.whisper_features.encode_all(
            [chat.waves[i] for chat, parts in zip(chats, heard, strict=True) for i in parts]
        )
        codes = iter(self.speech_codes.encode_all([w for c in chats for w in c.waves.values()]))
        encoded, first = [], 0
        for chat, parts in zip(chats, heard, strict=True):
            own, first = features[first : first + len(parts)], first + len(parts)
            prompt = self._layout(chat, {i: next(codes).tolist() for i in chat.waves})
            encoded.append((prompt, torch.cat(own) if own else None))
        return encoded

    def _layout(self, chat: Chat, codes: Mapping[int, Sequence[int]]) -> Prompt:
        encoded = [
            EncodedMessage(m.role, m.message_type, chat.text_ids[i], codes.get(i, ()))
            for i, m in enumerate(chat.messages)
        ]
        return self.prompt_builder.build(encoded, chat.output_type)


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

    Ids below ``token_offset`` are text. ``spoken`` speaks it, where the model itself does not.
    """

    request: Request
    task: Task
    scheduler: Scheduler
    text: TextStream
    token_offset: int
    sample_rate: int
    spoken: SpokenAnswer | None = None
    _deltas: list[str] = field(default_factory=list)
    _waves: list[Tensor] = field(default_factory=list)
    _stop: StopText = field(init=False)

    def __post_init__(self) -> None:
        self._stop = StopText(self.request.stop)

    def events(self) -> Iterator[TextDelta | AudioChunk]:
        """Text and speech as they become known. Closing the iterator stops generation."""
        try:
            yield from self._until_end()
            if self.spoken is not None:
                self.spoken.finish()
                yield from self._until_end()
        finally:
            self.close()

    def _until_end(self) -> Iterator[TextDelta | AudioChunk]:
        """What comes before the next None, or before a sequence that ends the text."""
        while not self._stop.found and (event := self.task.events.get()) is not None:
            if isinstance(event, BaseException):
                raise event
            if isinstance(event, Step):
                yield from self._read_text(event)
                continue
            chunk = event if isinstance(event, AudioChunk) else AudioChunk(event, self.sample_rate)
            self.request.clock.first("first_audio")
            self._waves.append(chunk.wav)
            yield chunk

    def all_events(self) -> Iterator[Event]:
        """:meth:`events`, then the :meth:`completion`."""
        yield from self.events()
        yield self.completion()

    def close(self) -> None:
        """Let go of the request; it is stopped unless it is complete."""
        if not self.task.ended:
            self.scheduler.abandon(self.task)
        if self.spoken is not None:
            self.spoken.close()

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
            if self.spoken is not None:
                self.spoken.push(delta)
            yield TextDelta(delta)

    def completion(self) -> Completion:
        """The whole answer, once all events are read."""
        generation, metrics = self.task.generation, self.request.clock.metrics
        assert generation is not None, "it is complete"
        speaks = self.task.speech is not None or self.spoken is not None
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
        elif self.spoken is not None:
            reason = "no speech: nothing in the text can be spoken"
        elif speaks:
            reason = missing_speech(generation)
        metrics |= {f"{stage}_seconds": spent for stage, spent in self.task.seconds.items()}
        metrics |= {
            "decode_steps": generation.steps,
            "text_tokens": len(text_ids),
            "speech_codes": len(codes),
            "stop_reason": stop_reason,
            **({} if self.spoken is None else {"speaker": self.spoken.name}),
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
