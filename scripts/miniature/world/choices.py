"""Questions that are answered with yes or no."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from scripts.miniature.world import core, things
from scripts.miniature.world.calendar import DAYS, MONTHS
from scripts.miniature.world.core import NAMES
from scripts.miniature.world.numbers import number
from scripts.miniature.world.splits import Turn

ABLE = {
    "fly": ("bird", "bee", "duck"),
    "swim": ("fish", "duck", "frog"),
    "run": ("dog", "horse", "cat", "rabbit"),
}
UNABLE = {
    "fly": ("dog", "cow", "fish", "chair", "cup"),
    "swim": ("chair", "lamp", "book"),
    "run": ("fish", "snake", "box"),
}


def answer(right: bool) -> str:
    return "yes" if right else "no"


def kinds() -> Iterator[Turn]:
    """Of all kinds, two that are not its own are asked about each thing."""
    groups = things.kinds()
    groups |= dict.fromkeys(DAYS, "a day") | dict.fromkeys(MONTHS, "a month")
    groups |= dict.fromkeys(NAMES, "a name") | dict.fromkeys(core.COLORS, "a color")
    every = sorted(set(groups.values()))
    for place, (thing, kind) in enumerate(groups.items()):
        others = [other for other in every if other != kind]
        asked = kind, others[place % len(others)], others[(place + 3) % len(others)]
        yield from (Turn(f"is {thing} {other}", answer(other == kind)) for other in asked)


def colors() -> Iterator[Turn]:
    for thing, color in (core.COLOR_OF | things.COLOR_OF).items():
        for other in core.COLORS:
            yield Turn(f"is the {thing} {other}", answer(other == color))


def numbers() -> Iterator[Turn]:
    for a, b in product(range(21), repeat=2):
        if 0 < abs(a - b) < 8:
            yield Turn(f"is {number(a)} bigger than {number(b)}", answer(a > b))
            yield Turn(f"is {number(a)} smaller than {number(b)}", answer(a < b))


def abilities() -> Iterator[Turn]:
    for right, table in ((True, ABLE), (False, UNABLE)):
        for verb, ones in table.items():
            yield from (Turn(f"can {things.article(one)} {verb}", answer(right)) for one in ones)
    for one, other in things.OPPOSITES:
        yield Turn(f"is {one} the opposite of {other}", "yes")
    pairs = zip(things.OPPOSITES, things.OPPOSITES[1:], strict=False)
    yield from (Turn(f"is {a[0]} the opposite of {b[1]}", "no") for a, b in pairs)
