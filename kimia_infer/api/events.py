"""The events of an answer: pieces of text and speech, then the whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Metrics = dict[str, Any]


@dataclass(frozen=True)
class TextDelta:
    """The next piece of the transcript; never empty."""

    text: str


@dataclass(frozen=True)
class WordTime:
    """A spoken word; seconds from the beginning of the answer."""

    text: str
    start: float
    end: float


@dataclass(frozen=True)
class AudioChunk:
    """The next samples of the spoken answer: float32 [samples], never empty; rate in Hz.

    ``words`` are those in it, from models that know their times.
    """

    wav: Tensor
    sample_rate: int
    words: tuple[WordTime, ...] = ()


@dataclass(frozen=True)
class Completion:
    """The whole answer, the last event.

    ``wav`` is float32 [1, samples] at ``sample_rate`` Hz, None without speech; ``audio_reason``
    then says why, if speech was asked for. ``text_ids`` exclude the end token, and the copies that
    were cut off a text that repeated itself; ``audio_ids`` are the audio track after its delay,
    end token included; ``codes`` are the speech codes among them. ``metrics`` holds seconds per
    stage and counts; its ``stop_reason`` is ``"end"``, ``"limit"``, ``"repetition"`` or, before a
    sequence that was to end the text, ``"stop"``. ``notes`` are sentences about problems that are
    no errors: silent audio, a text that was cut.
    """

    wav: Tensor | None
    sample_rate: int
    text: str
    text_ids: list[int]
    audio_ids: list[int]
    codes: list[int]
    metrics: Metrics
    audio_reason: str | None = None
    notes: list[str] = field(default_factory=list)


Event = TextDelta | AudioChunk | Completion
