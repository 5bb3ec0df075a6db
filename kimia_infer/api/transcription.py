"""Recordings of any length to text, segment by segment."""

from __future__ import annotations

import contextlib
import functools
import re
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kimia_infer.api.events import Completion, Event, Metrics, TextDelta
from kimia_infer.api.parameters import show
from kimia_infer.api.request import Stopwatch
from kimia_infer.audio.files import (
    SAMPLE_RATE,
    SILENCE_DBFS,
    constant_value,
    is_silent,
    loudest_dbfs,
)
from kimia_infer.audio.split import (
    LONGEST_SECONDS,
    SEARCH_SECONDS,
    SHORTEST_SECONDS,
    speech_within,
    split_at_quiet,
)
from kimia_infer.utils.errors import CheckpointError, RequestError
from kimia_infer.weights.component import read_json

INSTRUCTION = "Please transcribe the following audio:"
"""The published example's request for a transcript."""

INSTRUCTIONS = {"en": INSTRUCTION, "zh": "请将音频内容转换为文字。"}
"""The same by language (ISO 639-1); the published examples ask in these two."""

TRANSLATE = "Please translate the following audio into English:"

MAX_SECONDS = 7200.0
"""Longest recording by default."""

SEGMENT_FIELD = "segment_seconds"
"""In ``generation_config.json``: the longest segment of a model that knows short recordings only.

A field of this implementation; the published checkpoint has none and understands 30 s.
"""


def prompted(prompt: str, instruction: str) -> str:
    """The instruction, after what the caller says of the recording, such as names in it.

    The published model was not trained with such words; they are a hint like any other.
    """
    return f"{prompt.strip()}\n{instruction}" if prompt.strip() else instruction


class SoundStream(Protocol):
    """Blocks float32 [samples] at 16 kHz, and their length in seconds."""

    seconds: float

    def __iter__(self) -> Iterator[np.ndarray]: ...


class Answer(Protocol):
    """An answer that is under way: its events, last the Completion. ``close`` gives it up."""

    def all_events(self) -> Iterator[Event]: ...

    def close(self) -> None: ...


OnProgress = Callable[[float, float], None]
Begin = Callable[[np.ndarray, Callable[[], None]], Answer]

SUMMED = (
    "prompt_seconds",
    "encoders_seconds",
    "prefill_seconds",
    "decode_seconds",
    "prompt_tokens",
    "prompt_audio_tokens",
    "decode_steps",
    "text_tokens",
)
KEPT = ("attention", "head_rows", "quantization", "kv_cache", "offload")


@dataclass(frozen=True)
class TranscriptSegment:
    """One segment of a recording, from ``start`` to ``end`` seconds, and its text.

    A ``silent`` one, of any length, was not given to the model, which tends to invent words for
    silence. The text of a ``repetition`` was stopped because it repeated itself endlessly; one
    copy is kept. ``speech`` is where the first sound of a segment begins and the last one ends, in
    seconds of the recording; None for silence.
    """

    start: float
    end: float
    text: str
    silent: bool = False
    repetition: bool = False
    speech: tuple[float, float] | None = None

    @property
    def shown(self) -> tuple[float, float]:
        """When subtitles have the text."""
        return self.speech or (self.start, self.end)


@dataclass(frozen=True)
class Transcript:
    """The whole text of a recording, last of the events.

    ``segments`` follow each other without gaps from 0 to the recording's end. ``text`` is their
    texts joined, with a space where the writing uses them. ``metrics`` holds sums over segments.
    """

    text: str
    segments: list[TranscriptSegment]
    metrics: Metrics
    notes: list[str] = field(default_factory=list)


TranscriptEvent = TextDelta | TranscriptSegment | Transcript


def longest_segment(directory: Path) -> float:
    """Seconds of the longest segment that the model of a checkpoint directory understands.

    Raises CheckpointError if ``segment_seconds`` is no number from 2 to 30.
    """
    path = directory / "generation_config.json"
    values = read_json(path) if path.exists() else {}
    seconds = values.get(SEGMENT_FIELD, LONGEST_SECONDS)
    if not _is_segment(seconds):
        raise CheckpointError(f"{path}: {SEGMENT_FIELD} must be from 2 to 30, found {seconds!r}")
    return float(seconds)


def check_longest(seconds: Any) -> float:
    """The argument ``longest_segment``; raises RequestError if it is no number from 2 to 30."""
    if not _is_segment(seconds):
        raise RequestError(f"longest_segment: expected 2 to 30 seconds, found {show(seconds)}")
    return float(seconds)


def _is_segment(seconds: Any) -> bool:
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    return number and 2 * SHORTEST_SECONDS <= seconds <= LONGEST_SECONDS


@dataclass(frozen=True)
class _Part:
    """A piece of a recording, in seconds; ``answer`` is None for silence of one ``constant``."""

    start: float
    stop: float
    answer: Answer | None
    constant: float = 0.0
    speech: tuple[float, float] | None = None


def transcribe_stream(
    stream: SoundStream,
    begin: Begin,
    clock: Stopwatch,
    on_progress: OnProgress | None = None,
    longest: float = LONGEST_SECONDS,
    notes: Sequence[str] = (),
    together: int = 1,
) -> Iterator[TranscriptEvent]:
    """Transcribe a recording at 16 kHz while it is decoded, block by block.

    It is cut into segments of at most ``longest`` seconds, of which silent ones in a row become
    one. ``begin(segment, on_step)`` begins the answer to every other one, up to ``together`` at a
    time, and the answer calls ``on_step()`` as it goes. ``on_progress`` is then called with
    seconds transcribed and in all, and may raise. The text deltas joined are the text of the
    Transcript, whose notes begin with ``notes``.
    """
    segments: list[TranscriptSegment] = []
    silences: list[tuple[float, float]] = []
    total, notes, joined, metrics = stream.seconds, [*notes], _JoinedText(), dict(clock.metrics)
    gap: TranscriptSegment | None = None
    search = min(SEARCH_SECONDS, longest)
    cut = split_at_quiet(clock.timing("load_audio", stream), longest=longest, search=search)

    def report(done: float) -> None:
        if on_progress is not None:
            on_progress(done, total)

    with contextlib.closing(_ahead(cut, begin, report, together)) as parts:
        for part in parts:
            report(part.start)
            if part.answer is None:
                silences.append((part.stop - part.start, part.constant))
                start = part.start if gap is None else gap.start
                gap = TranscriptSegment(start, part.stop, "", silent=True)
                continue
            if gap is not None:
                segments.append(gap)
                yield gap
                gap = None
            joined.begin_segment()
            for event in part.answer.all_events():
                if isinstance(event, Completion):
                    segments.append(_segment(part, event))
                    span = f"{part.start:.2f} to {part.stop:.2f} s"
                    notes += [f"{span}: {note}" for note in event.notes]
                    _add(metrics, event.metrics)
                elif isinstance(event, TextDelta) and (delta := joined.push(event.text)):
                    clock.first("first_text")
                    yield TextDelta(delta)
            yield segments[-1]
    if gap is not None:
        segments.append(gap)
        yield gap
    report(total)
    notes += _quiet_notes(silences, total)
    metrics |= clock.metrics | {
        "input_audio_seconds": total,
        "segments": len(segments),
        "silent_segments": sum(segment.silent for segment in segments),
        "repetition_segments": sum(segment.repetition for segment in segments),
        "total_seconds": time.perf_counter() - clock.started,
    }
    yield Transcript(joined.text, segments, metrics, notes)


def _ahead(
    cut: Iterator[tuple[int, np.ndarray]],
    begin: Begin,
    report: Callable[[float], None],
    together: int,
) -> Generator[_Part]:
    """The parts of a recording, in order; the answers to the next ones are under way.

    Closing the iterator gives up those that are not complete.
    """
    parts: deque[_Part] = deque()
    current: _Part | None = None
    try:
        for first, samples in cut:
            start, stop = first / SAMPLE_RATE, (first + len(samples)) / SAMPLE_RATE
            if is_silent(loudest_dbfs(samples, SAMPLE_RATE)):
                parts.append(_Part(start, stop, None, constant_value(samples)))
            else:
                answer = begin(samples, functools.partial(report, start))
                begins, ends = ((first + n) / SAMPLE_RATE for n in speech_within(samples))
                parts.append(_Part(start, stop, answer, speech=(begins, ends)))
            while sum(part.answer is not None for part in parts) >= together:
                yield (current := parts.popleft())
        while parts:
            yield (current := parts.popleft())
    finally:
        for part in parts if current is None else [current, *parts]:
            if part.answer is not None:
                part.answer.close()


def _quiet_notes(silences: Sequence[tuple[float, float]], total: float) -> Iterator[str]:
    """What parts of a recording do instead of sounding, given their seconds and constant values."""
    silent = sum(seconds for seconds, value in silences if not value)
    constant = sum(seconds for seconds, value in silences if value)
    whole = f"of {total:.2f} s"
    if silent:
        yield f"{silent:.2f} {whole} are silent (below {SILENCE_DBFS:.0f} dBFS) and have no text"
    if constant:
        value = max((value for _, value in silences), key=abs)
        yield (
            f"{constant:.2f} {whole} hold one constant value ({value:.2g} of full scale), no "
            "sound, and have no text"
        )


def _segment(part: _Part, answer: Completion) -> TranscriptSegment:
    repetition = answer.metrics["stop_reason"] == "repetition"
    return TranscriptSegment(
        part.start, part.stop, answer.text.strip(), repetition=repetition, speech=part.speech
    )


def _add(metrics: Metrics, segment: Metrics) -> None:
    for name in SUMMED:
        if name in segment:
            metrics[name] = metrics.get(name, 0) + segment[name]
    metrics |= {name: segment[name] for name in KEPT}


UNSPACED = (
    "\u2e80-\u303f\u3040-\u30ff\u3100-\u312f\u31a0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\ufe30-\ufe4f\uff00-\uffef\U00020000-\U0003ffff"
)
"""Characters that stand without spaces, as ranges of a regular expression: Chinese ones, kana, and
the punctuation and full-width forms that go with them."""

_WITHOUT_SPACES = re.compile(f"[{UNSPACED}]")


def separator(before: str, after: str) -> str:
    """What belongs between two texts: a space, or nothing beside Chinese or Japanese."""
    if not before or not after:
        return ""
    return "" if _WITHOUT_SPACES.search(before[-1] + after[0]) else " "


class _JoinedText:
    """Joins the texts of segments while they arrive, without white space at their ends."""

    def __init__(self) -> None:
        self.text = ""
        self._begun = False
        self._space = ""

    def begin_segment(self) -> None:
        self._begun, self._space = False, ""

    def push(self, delta: str) -> str:
        """The next piece of a segment's text; what it adds to the whole."""
        piece = self._space + delta
        if not self._begun:
            piece = piece.lstrip()
        added = piece.rstrip()
        self._space = piece[len(added) :]
        if added and not self._begun:
            added = separator(self.text, added) + added
            self._begun = True
        self.text += added
        return added
