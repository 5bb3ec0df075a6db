"""Text that ends where one of several sequences begins."""

from __future__ import annotations

from collections.abc import Sequence


class StopText:
    """Gives out a text as it grows, up to the first of ``sequences`` in it.

    ``found`` says that there was one; nothing is given out afterwards. Text that may be the
    beginning of a sequence is held back until that is known.
    """

    def __init__(self, sequences: Sequence[str]):
        self.found = False
        self._sequences = sequences
        self._held = ""

    def push(self, text: str) -> str:
        """Take the next piece of the text; return what certainly precedes a sequence."""
        if self.found:
            return ""
        self._held += text
        places = [self._held.find(sequence) for sequence in self._sequences]
        if hits := [place for place in places if place >= 0]:
            self.found = True
            return self._release(min(hits))
        return self._release(len(self._held) - max(map(self._begun, self._sequences), default=0))

    def finish(self) -> str:
        """The text is complete: the rest of it."""
        return "" if self.found else self._release(len(self._held))

    def _begun(self, sequence: str) -> int:
        """How many of the last characters are the first ones of ``sequence``."""
        longest = min(len(sequence) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(sequence[:n])), 0)

    def _release(self, end: int) -> str:
        released, self._held = self._held[:end], self._held[end:]
        return released
