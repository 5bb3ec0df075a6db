"""What an answer consists of, as it comes and when it is complete."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Metrics = dict[str, Any]


@dataclass(frozen=True)
class TextDelta:
    """The next piece of the transcript; never empty."""

    text: str


@dataclass(frozen=True)
class AudioChunk:
    """The next samples of the spoken answer: float32 [samples] at 24 kHz; never empty."""

    wav: Tensor


@dataclass(frozen=True)
class Completion:
    """The whole answer, last of the events.

    ``wav`` float32 [1, samples] at 24 kHz, None without speech; ``audio_reason`` then says why,
    if speech was asked for. ``text_ids`` exclude the end token, and the copies that were cut off
    a text that repeated itself; ``audio_ids`` are the audio track after its delay, end token
    included; ``codes`` are the speech codes among them. ``metrics`` holds seconds per stage and
    counts; its ``stop_reason`` is ``"end"``, ``"limit"`` or ``"repetition"``. ``notes`` are
    sentences about what is not as hoped for: silent sound, a text that was cut.
    """

    wav: Tensor | None
    text: str
    text_ids: list[int]
    audio_ids: list[int]
    codes: list[int]
    metrics: Metrics
    audio_reason: str | None = None
    notes: list[str] = field(default_factory=list)


Event = TextDelta | AudioChunk | Completion


class Stopwatch:
    """Collects metrics; seconds are by the host's clock."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.metrics: Metrics = {}

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add what the block takes to ``<stage>_seconds``."""
        start = time.perf_counter()
        yield
        name = f"{stage}_seconds"
        self.metrics[name] = self.metrics.get(name, 0.0) + time.perf_counter() - start

    def first(self, name: str) -> None:
        """Note the time since the beginning, once."""
        self.metrics.setdefault(f"{name}_seconds", time.perf_counter() - self.started)
