"""A request in the engine: its task, its generation, and its row and places on the device.

The caller has a task, the host follows the generation, the device has a row of tensors for it, and
its keys and values stand in a span of the cache.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from kimia_infer.engine.repetition import RepetitionGuard
from kimia_infer.engine.speech import Speech
from kimia_infer.layers.sampler import (
    Randomness,
    Sampling,
    SamplingRows,
    TrackSampling,
    draw_dtype,
)

T = TypeVar("T")

OutputType = Literal["text", "both"]


class Tracks(NamedTuple):
    """Which tracks a step computes."""

    text: bool
    audio: bool


TEXT = Tracks(text=True, audio=False)
BOTH = Tracks(text=True, audio=True)
# After the text has ended: nothing above the fork reaches the audio track.
AUDIO = Tracks(text=False, audio=True)


@dataclass(frozen=True)
class ControlTokens:
    """Ids that steer the loop: the blank of both tracks and the tokens that end them."""

    blank: int
    text_end: int
    audio_ends: tuple[int, ...]


@dataclass(frozen=True)
class DecodeInput:
    """The prompt as the model reads it.

    audio_ids, text_ids int64 [1, length]; is_continuous bool [1, length]; features
    [continuous positions, adaptor_input_dim] or None when the prompt has no audio.
    """

    audio_ids: Tensor
    text_ids: Tensor
    is_continuous: Tensor | None = None
    features: Tensor | None = None

    @property
    def length(self) -> int:
        return self.audio_ids.shape[1]


AHEAD = 512
"""Places that a text has ahead of those that it has filled, where others need the rest."""


def places_needed(filled: int, positions: int, speaks: bool) -> int:
    """Places of the cache that a generation of so many positions cannot do without.

    ``filled`` are the positions of its prompt and of the steps launched so far.
    """
    return positions if speaks else min(positions, filled + AHEAD)


@dataclass(frozen=True)
class Progress:
    """The result of a poll: new ids, and how far the generation is.

    ``text_ids`` exclude the end token; ``audio_ids`` begin after the delay, end token included.
    """

    steps: int
    text_ids: list[int]
    audio_ids: list[int]
    finished: bool


class Decodes(Protocol):
    """What a generation needs of the decoder: the positions and the delay, and a run alone."""

    capacity: int
    delay: int

    def run(self, generation: Generation) -> Generator[Progress]: ...


class Generation:
    """One request on its way through the model.

    ``text_ids`` and ``audio_ids`` grow with it. ``poll_interval`` is the most steps between two
    polls of the device. ``broken`` says that its logits were not finite, which ended it.
    """

    def __init__(
        self,
        decoder: Decodes,
        prompt: DecodeInput,
        output_type: OutputType,
        max_steps: int,
        sampling: Sampling,
        randomness: Randomness,
        poll_interval: int = 1,
    ):
        self.positions = prompt.length + max_steps
        if self.positions > decoder.capacity:
            raise ValueError(
                f"{self.positions} positions do not fit in a capacity of {decoder.capacity}"
            )
        self.decoder, self.prompt, self.randomness = decoder, prompt, randomness
        self.sampling, self.max_steps, self.poll_interval = sampling, max_steps, poll_interval
        self._poll_at = 0
        self.delay = decoder.delay
        self.tracks = BOTH if output_type == "both" else TEXT
        self.speaks = self.tracks.audio
        self.launched, self.fetched = 0, 0
        self.ended = self.broken = False
        self.text_ids: list[int] = []
        self.audio_ids: list[int] = []

    @property
    def positions_launched(self) -> int:
        """Positions of the prompt and of the steps launched so far."""
        return self.prompt.length + self.launched

    @property
    def places_needed(self) -> int:
        return places_needed(self.positions_launched, self.positions, self.speaks)

    def run(self) -> Generator[Progress]:
        """Generate until the end token or the step limit, alone; may be stopped early."""
        return self.decoder.run(self)

    def poll_by(self, step: int) -> None:
        """Poll after ``step`` launched steps at the latest."""
        step = max(step, self.launched + 1)
        self._poll_at = min(self._poll_at, step) if self._poll_at > self.launched else step

    @property
    def due(self) -> int:
        """Steps to launch until the next poll, at least one."""
        next_poll = self.fetched + self.poll_interval
        if self._poll_at > self.launched:
            next_poll = min(next_poll, self._poll_at)
        return max(1, min(next_poll, self.max_steps) - self.launched)

    def take(self, row: Sequence[int], start: int, width: int) -> Progress:
        """Keep what a poll brought of the steps from ``start`` on."""
        steps, text_count, audio_count, text_ended, ended, finished, broken = row[:7]
        text, audio = row[7 : 7 + width], row[7 + width :]
        new = Progress(
            steps,
            list(text[: max(0, text_count - start)]),
            list(audio[max(0, self.delay - start) : max(0, audio_count + self.delay - start)]),
            bool(finished),
        )
        self.text_ids += new.text_ids
        self.audio_ids += new.audio_ids
        if self.speaks and text_ended:
            self.tracks = AUDIO
        self.ended, self.broken = bool(ended), bool(broken)
        return new

    @property
    def steps(self) -> int:
        """Steps up to the end of the answer; more may have been launched before it was seen."""
        if not self.ended:
            return self.launched
        return self.delay + len(self.audio_ids) if self.speaks else len(self.text_ids) + 1


@dataclass
class TrackRows:
    """One track: ids of all steps, their draws, the last id, and the logits of the next.

    ``store`` int64 and ``uniforms`` [rows, steps + 1], as a finished row stays one step behind
    its last id; ``count`` int64 [rows] of ids that belong to the answer; ``latest`` int64
    [rows, 1]; ``logits`` [rows, ids].
    """

    store: Tensor
    uniforms: Tensor
    count: Tensor
    latest: Tensor
    logits: Tensor
    sampling: SamplingRows

    @classmethod
    def create(
        cls, rows: int, steps: int, ids: int, blank: int, device: torch.device, dtype: torch.dtype
    ) -> TrackRows:
        """Rows of at most so many ``steps``, whose logits are those of ``ids`` ids."""
        store = torch.full((rows, steps + 1), blank, device=device)
        return cls(
            store,
            torch.zeros_like(store, dtype=draw_dtype(device)),
            torch.zeros_like(store[:, 0]),
            torch.zeros_like(store[:, :1]),
            torch.zeros(rows, ids, dtype=dtype, device=device),
            SamplingRows.create(rows, device),
        )

    def begin(self, row: int, sampling: TrackSampling, uniforms: Tensor) -> None:
        self.count[row] = 0
        self.uniforms[row, : len(uniforms)] = uniforms.to(self.uniforms)
        self.sampling.put(row, sampling)

    def put(self, step: Tensor, chosen: Tensor) -> None:
        """Keep the ids int64 [rows] chosen at ``step`` int64 [rows]."""
        self.latest.copy_(chosen[:, None])
        self.store.scatter_(1, step[:, None], self.latest)


@dataclass
class Rows:
    """Both tracks, and how far each row is; int64 or bool [rows].

    ``start`` is where its places in the key/value cache begin, ``step`` the number of steps whose
    ids are chosen, ``position`` that of the last of them, ``limit`` the largest number of steps.
    A row that ``speaks`` has an audio track. ``ended`` says that the model ended the answer,
    ``finished`` that the row advances no more, ``broken`` that its logits were not finite.
    """

    text: TrackRows
    audio: TrackRows
    start: Tensor
    step: Tensor
    position: Tensor
    limit: Tensor
    speaks: Tensor
    text_ended: Tensor
    ended: Tensor
    finished: Tensor
    broken: Tensor

    @classmethod
    def create(cls, text: TrackRows, audio: TrackRows) -> Rows:
        """Rows of nobody."""
        numbers = (torch.zeros_like(text.count) for _ in range(4))
        flags = (torch.zeros_like(text.count, dtype=torch.bool) for _ in range(5))
        rows = cls(text, audio, *numbers, *flags)
        rows.finished.fill_(True)
        return rows

    def move(self, source: int, target: int) -> None:
        """Overwrite row ``target`` with row ``source``."""
        for tensor in tensors(self):
            tensor[target] = tensor[source]

    def copied(self, row: int) -> list[Tensor]:
        """A copy of a row, to be :meth:`put` again."""
        return [tensor[row].clone() for tensor in tensors(self)]

    def put(self, row: int, copied: Sequence[Tensor]) -> None:
        """Overwrite row ``row`` with one that was copied."""
        for tensor, value in zip(tensors(self), copied, strict=True):
            tensor[row] = value

    def clear(self, row: int, start: int) -> None:
        """A row of nobody, which reads and writes the place ``start`` of the cache alone."""
        self.finished[row] = True
        self.position[row] = 0
        self.start[row] = start


def narrowed(state: T, first: int, end: int) -> T:
    """The rows from ``first`` to ``end`` of a state, as views."""
    fields: dict[str, Any] = {}
    for name in (f.name for f in dataclasses.fields(state)):  # pyrefly: ignore[bad-argument-type]
        value = getattr(state, name)
        fields[name] = (
            value[first:end] if isinstance(value, Tensor) else narrowed(value, first, end)
        )
    return type(state)(**fields)


def tensors(state: Any) -> Iterator[Tensor]:
    """All tensors of a state."""
    for name in (f.name for f in dataclasses.fields(state)):
        value = getattr(state, name)
        if isinstance(value, Tensor):
            yield value
        else:
            yield from tensors(value)


@dataclass(frozen=True)
class Step:
    """New ids of an answer. ``text_ids`` are those that can no longer be cut off."""

    steps: int
    text_ids: list[int]
    finished: bool


@dataclass(eq=False, kw_only=True)
class Task:
    """A request on its way through the engine.

    ``chat`` is what the engine's encoder makes a prompt of, which will have ``length`` positions.
    ``codes_of`` gives the speech codes among ids of the audio track; as published, other ids are
    left out. ``guard`` stops a text that repeats itself. ``check`` raises when the request is to
    end, for example because its time is over. ``events`` are Steps, waves float32
    [samples] on the CPU, and at the end None, or the error that ended the request; the caller may
    add others. ``seconds`` are what its stages took.
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
    events: SimpleQueue[Any] = field(default_factory=SimpleQueue)
    seconds: dict[str, float] = field(default_factory=dict)
    _stage_began: float = field(default_factory=time.perf_counter)

    @property
    def positions(self) -> int:
        return self.length + self.max_steps

    @property
    def places_needed(self) -> int:
        """Places of the cache without which it cannot begin."""
        return places_needed(self.length, self.positions, self.output_type == "both")

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
