"""Which generation has which row, and which places of the key/value cache.

An answer may become as long as its limit, and most end long before. So a generation has places for
all of it only while nobody else needs them. Then texts keep some ahead of what they have filled,
and get more as they go on. A text that finds none is put aside: its keys and values and its row are
kept until it has room again. Those who speak keep all of their places, since somebody listens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kimia_infer.engine.generation import Generation, Rows, Task
from kimia_infer.layers.attention import KeyValueCache


class Spans:
    """Gives out spans of the ``places`` of a cache, each in one piece, and takes them back.

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

    def length(self, start: int) -> int:
        """How many places the span that begins at ``start`` has."""
        return self._taken[start]

    def resize(self, start: int, length: int) -> bool:
        """Let the span at ``start`` have ``length`` places; False if others are in the way."""
        following = min((s for s in self._taken if s > start), default=self.places)
        if start + length > following:
            return False
        self._taken[start] = length
        return True

    def release(self, start: int) -> None:
        """Give back the span that begins at ``start``."""
        del self._taken[start]

    @property
    def free(self) -> int:
        """Places that belong to nobody."""
        return self.places - sum(self._taken.values())


@dataclass(frozen=True)
class Kept:
    """A generation that was put aside: keys and values of each layer, [heads, positions, dim], on
    the host, and its row."""

    layers: list[Tensor]
    row: list[Tensor]


class Room:
    """The room of up to ``slots`` generations in ``cache``, whose last place is nobody's.

    ``starts`` are those that have begun, in this order, and where their places begin; None for
    those put aside. The first rows of ``rows`` are those of ``running``, without gaps.
    """

    def __init__(self, cache: KeyValueCache, rows: Rows, slots: int):
        self.cache, self.rows, self.slots = cache, rows, slots
        self.spans = Spans(cache.places - 1)
        self.running: list[Generation] = []
        self.starts: dict[Generation, int | None] = {}
        self.kept: dict[Generation, Kept] = {}

    def fits(self, positions: int) -> bool:
        """Whether so many positions are free for another generation."""
        return len(self.starts) < self.slots and self.spans.find(positions) is not None

    def make(self, coming: Task | Generation) -> bool:
        """Whether a generation can begin. Others keep no more than they need, if that helps it."""
        if self.kept:  # they come first
            return False
        if not self.fits(coming.positions):
            self._shrink()
        return self.fits(coming.places_needed)

    def take(self, generation: Generation) -> int:
        """Where the places of a generation begin that is to begin: all, or those it needs at once.

        Raises ValueError if they are not free.
        """
        length = generation.positions
        if not self.fits(length):
            length = generation.places_needed
        if not self.fits(length):
            raise ValueError("no slot is free")
        start = self.starts[generation] = self.spans.take(length)
        return start

    def arrange(self) -> None:
        """Have places for the steps up to the next poll of all that run.

        Who began first is served first: for its sake later texts are put aside, and none of those
        that are comes back before an earlier one.
        """
        for generation in list(self.running):
            start = self.starts[generation]
            assert start is not None, "it runs"
            next_poll = generation.positions_launched + generation.poll_interval
            lacks = self.spans.length(start) < min(next_poll, generation.positions)
            if lacks and not self.spans.resize(start, generation.places_needed):
                self._put_aside(generation)
        if self.kept:
            self._shrink()
        begun = list(self.starts)
        for generation in begun:
            for other in reversed(begun) if generation in self.kept else ():
                if self.spans.find(generation.places_needed) is not None:
                    self._bring_back(generation)
                    break
                if other is generation:
                    return
                if other in self.running and not other.speaks:
                    self._put_aside(other)

    def _shrink(self) -> None:
        for generation in self.running:
            start = self.starts[generation]
            assert start is not None, "it runs"
            self.spans.resize(start, min(self.spans.length(start), generation.places_needed))

    def _put_aside(self, generation: Generation) -> None:
        start = self.starts[generation]
        assert start is not None, "it runs"
        filled = slice(start, start + generation.positions_launched)
        parts = self.cache.keys, self.cache.values
        layers = [layer[:, filled].to("cpu", copy=True) for part in parts for layer in part]
        self.kept[generation] = Kept(layers, self.rows.copied(self.running.index(generation)))
        self.starts[generation] = None
        self._free(generation, start)

    def _bring_back(self, generation: Generation) -> None:
        start, kept = self.spans.take(generation.places_needed), self.kept[generation]
        filled, row = slice(start, start + generation.positions_launched), len(self.running)
        parts = self.cache.keys, self.cache.values
        places = [layer[:, filled] for part in parts for layer in part]
        try:
            for place, layer in zip(places, kept.layers, strict=True):
                place.copy_(layer)
            self.rows.put(row, kept.row)
        except BaseException:
            self.spans.release(start)
            raise
        self.rows.start[row] = self.starts[generation] = start
        self.running.append(generation)
        del self.kept[generation]

    def release(self, generation: Generation) -> None:
        """Free the row and the places of a generation, finished or not."""
        start = self.starts.pop(generation)
        self.kept.pop(generation, None)
        if start is not None:
            self._free(generation, start)

    def _free(self, generation: Generation, start: int) -> None:
        self.spans.release(start)
        if generation not in self.running:
            return  # its prompt was being read
        row, last = self.running.index(generation), len(self.running) - 1
        moved = self.running.pop()
        if row != last:
            self.rows.move(last, row)
            self.running[row] = moved
        self.rows.clear(last, self.spans.places)

    def reset(self) -> None:
        """Release all generations, and forget the state of the rows."""
        self.running.clear()
        self.kept.clear()
        for start in self.starts.values():
            if start is not None:
                self.spans.release(start)
        self.starts.clear()
