"""Text of any length read aloud, sentence by sentence."""

from __future__ import annotations

import itertools
import re
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import torch

from kimia_infer.api.engine import Engine, surviving_out_of_memory
from kimia_infer.api.events import AudioChunk, Completion, Metrics
from kimia_infer.api.parameters import Parameters
from kimia_infer.api.request import Deadline, Response, Stopwatch
from kimia_infer.models.kimi_audio.prompt import AudioInput
from kimia_infer.utils.errors import RequestError

READ = "Please read aloud: "
"""Goes before a text that the model is to speak."""

LONGEST_PIECE = 250
"""Characters that are read at a time: about 20 s in English and 60 s in Chinese, of the 120 s that
prompt and answer may last."""

PAUSE_SECONDS = 0.2
"""Silence between two pieces."""

SENTENCES = re.compile(
    r"""[^\n]+?(?:[.?!…]+["'”’)]*(?=\s|$)|[。？！]+[”’」』）]*|(?=\n)|$)""",
)
TITLES = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|vs|e\.g|i\.e)\.$")
"""Words whose full stop does not end a sentence."""

MARKS = re.compile(r"[,;:—](?=\s)|[，；：、]")
"""Where a sentence that is too long is cut, if there are any in its last two thirds."""

SUMMED = ("prompt_tokens", "decode_steps", "text_tokens", "speech_codes")


class NoSpeech(RequestError):
    """There are no words in a text, or the model did not speak any of them."""


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
    as soon as the one before sounds. ``options``, ``voice`` and ``deadline`` are those of
    ``KimiAudio.respond``, ``output_type`` must be ``"both"``.

    Raises NoSpeech, and what ``respond`` raises.
    """
    if options.output_type != "both":
        raise RequestError("output_type: what is read aloud is speech; ask for 'both'")
    pieces = list(split_text(text))
    if not pieces:
        raise NoSpeech("there are no words to read aloud")
    request = f"{instructions.strip()}\n{READ}" if instructions.strip() else READ
    chats = [
        [{"role": "user", "message_type": "text", "content": request + piece}] for piece in pieces
    ]
    deadline = deadline or Deadline(options.timeout_seconds)
    return surviving_out_of_memory(_read(model, chats, options, voice, deadline))


def split_text(text: str) -> Iterator[str]:
    """The sentences of ``text``, those of more than 250 characters in pieces.

    A line ends a sentence, too. What has no letter or digit is left out.
    """
    held = ""
    for sentence in SENTENCES.findall(text):
        held = f"{held} {sentence.strip()}".strip()
        if TITLES.search(held):
            continue
        yield from _cut(held)
        held = ""
    yield from _cut(held)


def _cut(sentence: str) -> Iterator[str]:
    while len(sentence) > LONGEST_PIECE:
        marks = [mark.end() for mark in MARKS.finditer(sentence[:LONGEST_PIECE])]
        place = marks[-1] if marks and marks[-1] > LONGEST_PIECE // 3 else 0
        place = place or sentence.rfind(" ", 1, LONGEST_PIECE) + 1 or LONGEST_PIECE
        yield sentence[:place].strip()
        sentence = sentence[place:].strip()
    if any(letter.isalnum() for letter in sentence):
        yield sentence


@torch.inference_mode()
def _read(
    model: Engine,
    chats: Sequence[list[dict]],
    options: Parameters,
    voice: AudioInput | None,
    deadline: Deadline,
) -> Generator[ReadingEvent]:
    clock, notes, seconds = Stopwatch(), list[str](), 0.0
    metrics: Metrics = dict.fromkeys(SUMMED, 0)
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
