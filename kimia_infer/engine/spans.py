"""Which places of the key/value cache belong to which request."""

from __future__ import annotations


class Spans:
    """Gives out spans of ``places``, each in one piece, and takes them back.

    The first gap that is large enough is used, so that spans gather at the beginning.
    """

    def __init__(self, places: int):
        self.places = places
        self._taken: dict[int, int] = {}  # start -> length, by start

    def find(self, length: int) -> int | None:
        """Where ``length`` places are free in a row; None if nowhere."""
        end = 0
        for start, taken in sorted(self._taken.items()):
            if start - end >= length:
                return end
            end = start + taken
        return end if self.places - end >= length else None

    def take(self, length: int) -> int:
        """The start of a span of ``length`` places. Raises ValueError if there is none."""
        start = self.find(length)
        if start is None:
            raise ValueError(f"there are no {length} free places in a row")
        self._taken[start] = length
        return start

    def release(self, start: int) -> None:
        """Give back the span that begins at ``start``."""
        del self._taken[start]

    @property
    def free(self) -> int:
        """Places that belong to nobody."""
        return self.places - sum(self._taken.values())
