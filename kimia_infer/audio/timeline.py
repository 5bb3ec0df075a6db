"""The times of a file's frames against the samples in them: which gaps are silence."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import av
from av.container import InputContainer
from av.format import Flags

GAP_SECONDS = 0.1
FLAC_GAP_SECONDS = 0.001
"""Shorter gaps between the times of a file are closed: they are how exactly it gives times. FLAC
counts samples, so that a gap is a frame that was lost."""

LONGEST_GAP_SECONDS = 3600.0
LONGEST_JUMP_SECONDS = 10.0
"""Longer gaps are closed, too. In formats whose clock may jump, such as MPEG-TS, already those
of seconds."""

LATE_SECONDS = 1.0
"""A gap that the times of so much sound behind it make up for is none."""


class Timeline:
    """Compares the times of a file's frames with the samples in them."""

    def __init__(self, container: InputContainer):
        start = container.start_time
        self._expected = None if start is None else start / av.time_base
        jumps = container.format.flags & Flags.ts_discont.value
        self._least = FLAC_GAP_SECONDS if container.format.name == "flac" else GAP_SECONDS
        self._longest = LONGEST_JUMP_SECONDS if jumps else LONGEST_GAP_SECONDS
        # How far the samples are ahead of the times, which may jitter, or behind those that
        # are about to fall back.
        self._ahead = self._behind = 0.0
        self._coming: deque[tuple[float | None, float, av.AudioFrame]] = deque()
        self._filled: list[float] = []
        self._closed: list[float] = []
        self.seconds = 0.0

    def gaps(self, frames: Iterable[av.AudioFrame]) -> Iterator[tuple[float, av.AudioFrame]]:
        """Frames after the seconds of silence between the end of the one before and theirs."""
        held = 0.0
        for frame in frames:
            length = frame.samples / frame.sample_rate
            self._coming.append((self._step(frame, length), length, frame))
            held += length
            while held > LATE_SECONDS:
                held -= self._coming[0][1]
                yield self._next()
        while self._coming:
            yield self._next()

    def _step(self, frame: av.AudioFrame, length: float) -> float | None:
        """How much later than expected a frame begins, in seconds; None if it is not known."""
        time, expected = frame.time, self._expected
        if time is None:
            self._expected = None if expected is None else expected + length
            return None
        self._expected = time + length
        step = 0.0 if expected is None else time - expected
        if abs(step) <= self._longest:
            return step
        if step > 0:  # another clock
            self._closed.append(step)
        return None

    def _next(self) -> tuple[float, av.AudioFrame]:
        step, length, frame = self._coming.popleft()
        gap = 0.0 if step is None else self._gap(step)
        self.seconds += length + gap
        if gap:
            self._filled.append(gap)
        return gap, frame

    def _gap(self, step: float) -> float:
        if step < 0:
            back = min(self._behind, -step)
            self._behind -= back
            step += back
        gap = step - self._ahead
        self._ahead = max(0.0, -gap)
        if min(step, gap) <= self._least:
            return 0.0
        # Times of a live recording may be those of arrival: late, and then in time again.
        after = lowest = 0.0
        for later, _, _ in self._coming:
            if later is None:
                break
            after += later
            lowest = min(lowest, after)
        self._behind -= lowest
        gap += lowest
        return gap if gap > self._least else 0.0

    def notes(self) -> Iterator[str]:
        if self._filled:
            count = f"{len(self._filled)} gap{'s' * (len(self._filled) > 1)}"
            yield f"silence fills {count} between its times, {sum(self._filled):.2f} s"
        if self._closed:
            yield (
                f"its times jump forward by {max(self._closed):.1f} s without sound, which was "
                f"left out ({len(self._closed)} jumps over {self._longest:g} s)"
            )
