"""Detects text that repeats itself endlessly while it is generated, and cuts the copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_UNIT = 128
"""Longest unit, in tokens, whose repetition is detected: several sentences."""

MIN_COPIES = 4
"""Fewest copies that count as a loop; two or three are common in speech and poems."""

MIN_TOKENS = 128
"""Fewest tokens that the copies of a loop fill."""

SPOKEN_TOKENS_PER_SECOND = 16.0
"""Tokens per second of identical copies that exceed what anyone can say.

The fastest repeated syllables are about 7 a second ("ha ha ha", "la la la", a rattle), and a
transcript spends at most two tokens on each, the syllable and a separator. Counting is no
repetition, as its numbers differ; refrains repeat at a few tokens a second.
"""


@dataclass(frozen=True)
class Repetition:
    """Ids from index ``keep`` on are copies of the ``unit`` ids before it."""

    keep: int
    unit: int


class RepetitionGuard:
    """Watches the ids of one text while it is generated.

    The ids loop when they end in at least ``MIN_COPIES`` copies of one to ``MAX_UNIT`` ids that
    fill at least ``min_tokens``. An incomplete last copy counts as far as it goes.
    """

    def __init__(self, min_tokens: int = MIN_TOKENS):
        self.min_tokens = min_tokens
        self.repetition: Repetition | None = None
        self._ids: list[int] = []
        self._released = 0
        # How many of the last ids equal the one p places before them, for p = 1, 2, ...
        self._matched = np.zeros(MAX_UNIT, dtype=np.int64)
        self._periods = np.arange(1, MAX_UNIT + 1)

    @classmethod
    def for_speech(cls, seconds: float) -> RepetitionGuard:
        """For the transcript of ``seconds`` of audio: separates loops from what can be said."""
        return cls(max(MIN_TOKENS, round(SPOKEN_TOKENS_PER_SECOND * seconds)))

    def push(self, ids: Sequence[int]) -> list[int]:
        """Take the next ids; return those that can no longer be cut off.

        Once a ``repetition`` is found, further ids are ignored, and all that is kept has been
        returned.
        """
        for token in ids:
            if self.repetition is None:
                self._append(token)
        if self.repetition is not None:
            return self._release(self.repetition.keep)
        return self._release(len(self._ids) - int(self._matched.max()))

    def finish(self) -> list[int]:
        """There are no more ids: return the rest of those that are kept."""
        return self._release(len(self._ids) if self.repetition is None else self.repetition.keep)

    def _append(self, token: int) -> None:
        ids, matched, periods = self._ids, self._matched, self._periods
        before = np.array(ids[: -MAX_UNIT - 1 : -1], dtype=np.int64)
        matched[: len(before)] = np.where(before == token, matched[: len(before)] + 1, 0)
        ids.append(token)
        filled = matched + periods
        loops = (matched > 0) & (filled >= self.min_tokens) & (filled >= MIN_COPIES * periods)
        if loops.any():
            unit = int(periods[loops][0])
            self.repetition = Repetition(len(ids) - int(matched[unit - 1]), unit)

    def _release(self, end: int) -> list[int]:
        start, self._released = self._released, max(self._released, end)
        return self._ids[start : self._released]
