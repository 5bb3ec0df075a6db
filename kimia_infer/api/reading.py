"""Text of any length read aloud, sentence by sentence."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch

from kimia_infer.api.engine import Engine, surviving_out_of_memory
from kimia_infer.api.events import AudioChunk, Completion, Metrics
from kimia_infer.api.parameters import Parameters
from kimia_infer.api.request import Deadline, Response, Stopwatch
from kimia_infer.api.sentences import split_text
from kimia_infer.layers.sampler import SeededRandomness
from kimia_infer.models.kimi_audio.prompt import AudioInput
from kimia_infer.utils.errors import NoSpeech, RequestError

READ = "Please read aloud: "
"""Goes before a text that the model is to speak."""

PAUSE_SECONDS = 0.2
"""Silence between two pieces."""

SUMMED = ("prompt_tokens", "decode_steps", "text_tokens", "speech_codes")


@dataclass(frozen=True)
class Reading:
    """The end of a text that was read aloud, last of the events.

    ``metrics`` holds sums over its pieces, ``notes`` what went wrong in some of them.
    """

    metrics: Metrics
    notes: list[str]


ReadingEvent = AudioChunk | Reading


def read_aloud(
    model: Engine,
    text: str,
    options: Parameters,
    *,
    instructions: str = "",
    voice: AudioInput | None = None,
    deadline: Deadline | None = None,
) -> Generator[ReadingEvent]:
    """Speak a text of any length: AudioChunk events and, last, the Reading.

    Each sentence is an answer of its own, after ``instructions`` in words, and the next one begins
    as soon as the one before sounds. A speaker of Kokoro reads the text by itself, without
    instructions. ``options``, ``voice`` and ``deadline`` are those of ``KimiAudio.respond``,
    ``output_type`` must be ``"both"``.

    Raises NoSpeech, and what ``respond`` raises.
    """
    if options.output_type != "both":
        raise RequestError("output_type: what is read aloud is speech; ask for 'both'")
    deadline = deadline or Deadline(options.timeout_seconds)
    options = options.model_copy(update={"seed": SeededRandomness(options.seed).seed})
    if options.speaker:
        model.check(options, voice is not None)
        if instructions.strip():
            raise RequestError("instructions: a speaker of Kokoro takes none; leave them out")
        return surviving_out_of_memory(_spoken(model, text, options, deadline))
    pieces = split_text(text)
    if not pieces:
        raise NoSpeech("there are no words to read aloud")
    request = f"{instructions.strip()}\n{READ}" if instructions.strip() else READ
    chats = [
        [{"role": "user", "message_type": "text", "content": request + piece}] for piece in pieces
    ]
    return surviving_out_of_memory(_read(model, chats, options, voice, deadline))


def _spoken(
    model: Engine, text: str, options: Parameters, deadline: Deadline
) -> Generator[ReadingEvent]:
    """The text in a voice of Kokoro."""
    for event in model.speak(text, options, deadline):
        if isinstance(event, AudioChunk):
            yield event
        elif isinstance(event, Completion):
            yield Reading(dict.fromkeys(SUMMED, 0) | event.metrics, event.notes)


@torch.inference_mode()
def _read(
    model: Engine,
    chats: Sequence[list[dict]],
    options: Parameters,
    voice: AudioInput | None,
    deadline: Deadline,
) -> Generator[ReadingEvent]:
    clock, notes, seconds = Stopwatch(), list[str](), 0.0
    metrics: Metrics = dict.fromkeys(SUMMED, 0) | {"seed": options.seed}
    rest, under_way = iter(chats), deque[Response]()

    def begin_next() -> None:
        for chat in itertools.islice(rest, 1):
            under_way.append(model.start(chat, options, voice=voice, deadline=deadline))

    try:
        for number in range(len(chats)):
            if not under_way:
                begin_next()
            silent = True
            for event in under_way[0].all_events():
                if isinstance(event, AudioChunk):
                    if silent and seconds:
                        pause = torch.zeros(round(PAUSE_SECONDS * event.sample_rate))
                        yield AudioChunk(pause, event.sample_rate)
                    if silent:
                        begin_next()
                    clock.first("first_audio")
                    silent, seconds = False, seconds + len(event.wav) / event.sample_rate
                    yield event
                elif isinstance(event, Completion):
                    where = f"piece {number + 1} of {len(chats)}: "
                    reasons = [] if event.audio_reason is None else [event.audio_reason]
                    notes += [where + text for text in (*reasons, *event.notes)]
                    metrics |= {name: metrics[name] + event.metrics[name] for name in SUMMED}
            under_way.popleft()
    finally:
        for response in under_way:
            response.close()
    if not seconds:
        raise NoSpeech(f"the model spoke none of it ({'; '.join(notes)})")
    metrics |= clock.metrics | {"output_audio_seconds": seconds}
    yield Reading(metrics | {"total_seconds": time.perf_counter() - clock.started}, notes)
