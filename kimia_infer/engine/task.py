"""A request in the engine, and what its caller hears of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from torch import Tensor

from kimia_infer.engine.generation import Generation, OutputType
from kimia_infer.engine.repetition import RepetitionGuard
from kimia_infer.engine.speech import Speech
from kimia_infer.layers.sampler import Randomness, Sampling


@dataclass(frozen=True)
class Step:
    """New ids of an answer. ``text_ids`` are those that can no longer be cut off."""

    steps: int
    text_ids: list[int]
    finished: bool


TaskEvent = Step | Tensor | BaseException | None
"""Ids, a wave float32 [samples] on the CPU, the reason why the request failed, or None, the end."""


@dataclass(eq=False, kw_only=True)
class Task:
    """A request on its way through the engine.

    ``chat`` is what the engine's encoder makes a prompt of, which will have ``length`` positions.
    ``codes_of`` gives the speech codes among ids of the audio track; as published, other ids are
    left out. ``guard`` stops a text that repeats itself. ``check`` raises when the request is to
    end, for example because its time is over. ``seconds`` are what its stages took.
    """

    chat: Any
    length: int
    max_steps: int
    output_type: OutputType
    sampling: Sampling
    randomness: Randomness
    check: Callable[[], None]
    codes_of: Callable[[Sequence[int]], list[int]]
    guard: RepetitionGuard | None = None
    speech: Speech | None = None
    generation: Generation | None = None
    encoded: bool = False
    abandoned: bool = False
    ended: bool = False
    admitted: float = 0.0  # to a slot, by the monotonic clock
    events: SimpleQueue[TaskEvent] = field(default_factory=SimpleQueue)
    seconds: dict[str, float] = field(default_factory=dict)
    _stage_began: float = field(default_factory=time.perf_counter)

    @property
    def positions(self) -> int:
        return self.length + self.max_steps

    @property
    def repeats(self) -> bool:
        """Whether the text was stopped because it repeats itself."""
        return self.guard is not None and self.guard.repetition is not None

    def finish_stage(self, name: str) -> None:
        """The time since the last stage ended was that of stage ``name``."""
        now = time.perf_counter()
        self.seconds[name] = now - self._stage_began
        self._stage_began = now

    def end(self, error: BaseException | None = None) -> None:
        """Tell the caller, once, that this was all, or why there is no more."""
        if not self.ended:
            self.ended = True
            self.events.put(error)
