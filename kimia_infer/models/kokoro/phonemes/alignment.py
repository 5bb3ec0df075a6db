"""Which phonemes belong to which written word, where their numbers differ."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

MOST = 12
"""Words that may be joined; the longest figures are read as more."""

DIGIT = 4.0
"""Phonemes for a digit, about; a letter is one."""
JOIN = 0.03
"""What joining two words costs, so that no more are joined than must be."""


def aligned(words: Sequence[str], spoken: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of written and spoken words, in order; some of each may be joined by spaces.

    espeak-ng joins common words (``of the``) and reads figures as several. Where the numbers
    differ, neighbours are joined so that lengths fit best.
    """
    if not words or not spoken:
        return [(" ".join(words), " ".join(spoken))] if spoken else []
    if len(words) == len(spoken):
        return list(zip(words, spoken, strict=True))
    written = _shares([sum(DIGIT if c.isdigit() else 1 for c in word) for word in words])
    heard = _shares([sum(c not in "ˈˌː" for c in word) for word in spoken])
    costs = {(0, 0): (0.0, (0, 0))}
    for i in range(1, len(words) + 1):
        for j in range(1, len(spoken) + 1):
            steps = [(i - 1, j - n) for n in range(1, min(j, MOST) + 1)]
            steps += [(i - n, j - 1) for n in range(2, min(i, MOST) + 1)]
            found = [
                (
                    costs[a, b][0]
                    + abs(written[i] - written[a] - heard[j] + heard[b])
                    + JOIN * (i - a + j - b - 2),
                    (a, b),
                )
                for a, b in steps
                if (a, b) in costs
            ]
            if found:
                costs[i, j] = min(found)
    if (len(words), len(spoken)) not in costs:
        return [(" ".join(words), " ".join(spoken))]
    pairs, place = [], (len(words), len(spoken))
    while place != (0, 0):
        before = costs[place][1]
        pairs.append(
            (" ".join(words[before[0] : place[0]]), " ".join(spoken[before[1] : place[1]]))
        )
        place = before
    return pairs[::-1]


def _shares(lengths: Sequence[float]) -> list[float]:
    """The share of the whole that ends before each place, 0 first."""
    total = sum(lengths) or 1
    return [0.0, *(end / total for end in accumulate(lengths))]
