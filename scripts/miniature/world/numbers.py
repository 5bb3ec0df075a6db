"""Numbers to a hundred: arithmetic, counting, and which of two is bigger."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from scripts.miniature.world.core import COUNTS, NEIGHBORS, NUMBERS, SUMS
from scripts.miniature.world.splits import Turn

TEENS = ("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
UNITS = range(1, 10)
HUNDRED = 100

BIGGER = ("which is bigger {} or {}", "which number is bigger {} or {}", "what is more {} or {}")
SMALLER = ("which is smaller {} or {}", "which number is smaller {} or {}", "what is less {} or {}")
DOUBLES = ("what is double {}", "double {}", "tell me double {}")
HALVES = ("what is half of {}", "half of {}", "tell me half of {}")


def number(value: int) -> str:
    """The words of 0 .. 100."""
    if value == HUNDRED:
        return "one hundred"
    if value < 20:
        return (NUMBERS + TEENS)[value]
    tens, unit = divmod(value, 10)
    return f"{TENS[tens - 2]} {NUMBERS[unit]}" if unit else TENS[tens - 2]


def sums() -> Iterator[Turn]:
    """Sums beyond twelve; of larger numbers those that need no carrying."""
    pairs = [(a, b) for a, b in product(range(1, 13), repeat=2) if 12 < a + b <= 20]
    pairs += [(a, b) for a, b in product(range(10, 91, 10), repeat=2) if a + b <= HUNDRED]
    pairs += [(a, b) for a, b in product(range(20, 100), UNITS) if a % 10 + b < 10]
    for form, (a, b) in product(SUMS, pairs):
        yield Turn(form.format(f"{number(a)} plus {number(b)}"), number(a + b))


def differences() -> Iterator[Turn]:
    """The same, backwards."""
    pairs = [(a, b) for a, b in product(range(13, 21), range(1, 13)) if a - b <= 12]
    pairs += [(a, b) for a, b in product(range(20, 101, 10), range(10, 91, 10)) if a >= b]
    pairs += [(a, b) for a, b in product(range(21, 100), UNITS) if a % 10 >= b]
    for form, (a, b) in product(SUMS, pairs):
        yield Turn(form.format(f"{number(a)} minus {number(b)}"), number(a - b))


def products() -> Iterator[Turn]:
    pairs = {(a, b) for a, b in product(range(1, 6), repeat=2)}
    pairs |= {pair for a in range(1, 11) for b in (2, 10) for pair in ((a, b), (b, a))}
    for form, (a, b) in product(SUMS, sorted(pairs)):
        yield Turn(form.format(f"{number(a)} times {number(b)}"), number(a * b))
    for n in range(1, 11):
        yield from (Turn(form.format(number(n)), number(2 * n)) for form in DOUBLES)
        yield from (Turn(form.format(number(2 * n)), number(n)) for form in HALVES)


def neighbors() -> Iterator[Turn]:
    for form, n in product(NEIGHBORS, range(len(NUMBERS) - 1, HUNDRED + 1)):
        if n < HUNDRED:
            yield Turn(form.format(f"after {number(n)}"), number(n + 1))
        if n >= len(NUMBERS):
            yield Turn(form.format(f"before {number(n)}"), number(n - 1))


def counts() -> Iterator[Turn]:
    """Upwards from twelve or less, downwards, and in steps; at most five numbers."""
    series: dict[str, range] = {}
    for first in range(2, 17):
        for last in range(max(first + 1, 13), min(first + 4, 20)):
            series[f"from {number(first)} to {number(last)}"] = range(first, last + 1)
    for first in range(2, 6):
        series[f"down from {number(first)}"] = range(first, 0, -1)
    for step, name in ((2, "twos"), (5, "fives"), (10, "tens")):
        for last in range(2 * step, 6 * step, step):
            series[f"by {name} to {number(last)}"] = range(step, last + 1, step)
    for form, (asked, values) in product(COUNTS, series.items()):
        yield Turn(form.format(asked), " ".join(map(number, values)))


def comparisons() -> Iterator[Turn]:
    values = [*range(21), *range(30, HUNDRED + 1, 10)]
    for a, b in product(values, repeat=2):
        if a == b:
            continue
        for forms, choose in ((BIGGER, max), (SMALLER, min)):
            form = forms[(a + b) % len(forms)]
            yield Turn(form.format(number(a), number(b)), number(choose(a, b)))
