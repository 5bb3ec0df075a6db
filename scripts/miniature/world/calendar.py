"""Days, months, seasons and the clock."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from scripts.miniature.world.numbers import number
from scripts.miniature.world.splits import Turn

DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
MONTHS = (
    "january", "february", "march", "april", "may", "june", "july", "august", "september",
    "october", "november", "december",
)  # fmt: skip
SEASONS = ("spring", "summer", "autumn", "winter")
LENGTHS = {
    ("days", "a week"): 7,
    ("months", "a year"): 12,
    ("hours", "a day"): 24,
    ("minutes", "an hour"): 60,
    ("seconds", "a minute"): 60,
    ("seasons", "a year"): 4,
}
NEXT = ("what comes {}", "what {kind} comes {}", "which {kind} comes {}", "tell me what comes {}")
HOW_MANY = ("how many {} are in {}", "how many {} does {} have", "tell me how many {} are in {}")
CLOCK = ("what time is it one hour {}", "tell me the time one hour {}", "one hour {}")


def neighbors() -> Iterator[Turn]:
    """What comes before and after each; behind the last one comes the first."""
    rings: dict[str, Sequence[str]] = {"day": DAYS, "month": MONTHS, "season": SEASONS}
    for kind, ring in rings.items():
        for form, (place, name) in product(NEXT, enumerate(ring)):
            after, before = ring[(place + 1) % len(ring)], ring[place - 1]
            yield Turn(form.format(f"after {name}", kind=kind), after)
            yield Turn(form.format(f"before {name}", kind=kind), before)


def lengths() -> Iterator[Turn]:
    for form, ((many, one), count) in product(HOW_MANY, LENGTHS.items()):
        yield Turn(form.format(many, one), number(count))


def parts() -> Iterator[Turn]:
    """The first and last, and the season of a month."""
    for form in ("what is the {}", "which is the {}", "tell me the {}"):
        yield Turn(form.format("first day of the week"), DAYS[0])
        yield Turn(form.format("last day of the week"), DAYS[-1])
        yield Turn(form.format("first month of the year"), MONTHS[0])
        yield Turn(form.format("last month of the year"), MONTHS[-1])
        for place, month in enumerate(MONTHS):
            season = SEASONS[((place - 2) % 12) // 3]
            yield Turn(form.format(f"season in {month}"), season)


def clock() -> Iterator[Turn]:
    for form, hour in product(CLOCK, range(1, 13)):
        yield Turn(form.format(f"after {number(hour)}"), number(hour % 12 + 1))
        yield Turn(form.format(f"before {number(hour)}"), number((hour - 2) % 12 + 1))
