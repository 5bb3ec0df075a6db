"""Loops are found where they are, and nowhere else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimia_infer.engine.repetition import (
    MAX_UNIT,
    MIN_COPIES,
    MIN_TOKENS,
    SPOKEN_TOKENS_PER_SECOND,
    RepetitionGuard,
)

UNITS = st.lists(st.integers(0, 3), min_size=1, max_size=12)
TEXTS = st.lists(st.integers(10, 200), max_size=60)


def longest_loop(ids: list[int], min_tokens: int) -> bool:
    """Whether the ids end in copies that fill so many, by trying every unit directly."""
    for unit in range(1, MAX_UNIT + 1):
        filled = unit
        while filled < len(ids) and ids[-filled - 1] == ids[-filled - 1 + unit]:
            filled += 1
        if filled > unit and filled >= max(min_tokens, MIN_COPIES * unit):
            return True
    return False


def first_loop(ids: list[int], min_tokens: int) -> int | None:
    return next((n for n in range(len(ids) + 1) if longest_loop(ids[:n], min_tokens)), None)


def primitive(unit: list[int]) -> int:
    """Length of the shortest unit whose copies are the same text."""
    return next(
        n
        for n in range(1, len(unit) + 1)
        if len(unit) % n == 0 and unit == unit[:n] * (len(unit) // n)
    )


@given(TEXTS, UNITS, st.integers(30, 50), st.integers(1, 7))
def test_a_loop_is_stopped_and_one_copy_kept(
    text: list[int], unit: list[int], min_tokens: int, portion: int
) -> None:
    ids = text + unit * 60
    stop = first_loop(ids, min_tokens)
    guard = RepetitionGuard(min_tokens)
    released: list[int] = []
    for start in range(0, len(ids), portion):
        released += guard.push(ids[start : start + portion])
        if guard.repetition is not None:
            break
    assert start < stop <= start + portion
    released += guard.finish()
    assert released == ids[: guard.repetition.keep]
    if stop > len(text):
        # No id of the unit is in the text, so the copies begin where the text ends. What repeats
        # within two units is shorter than the tokens that a loop needs here.
        assert guard.repetition.unit == primitive(unit)
        assert guard.repetition.keep == len(text) + primitive(unit)


@given(st.lists(st.integers(0, 2), max_size=120), st.integers(3, 30), st.integers(1, 9))
def test_against_every_unit(ids: list[int], min_tokens: int, portion: int) -> None:
    """Texts of three tokens repeat themselves often: found exactly where the definition says."""
    guard = RepetitionGuard(min_tokens)
    released: list[int] = []
    for start in range(0, len(ids), portion):
        released += guard.push(ids[start : start + portion])
        assert released == ids[: len(released)]
    stop = first_loop(ids, min_tokens)
    assert (guard.repetition is None) == (stop is None)
    released += guard.finish()
    kept = ids if stop is None else ids[: guard.repetition.keep]
    assert released == kept
    if stop is not None:
        assert guard.push([7, 8, 9]) == guard.finish() == []


@pytest.mark.parametrize(
    "ids",
    [
        pytest.param([5] * (30 * 7), id="laughing for 30 seconds, 7 times a second"),
        pytest.param([5, 6] * (30 * 7), id="la, la, la, as fast as one can"),
        pytest.param([*range(12), 40, 41] * 8, id="a refrain, eight times"),
        pytest.param([t for n in range(200) for t in (n // 10, n % 10, 99)], id="counting"),
        pytest.param([t for n in range(300) for t in (7, 8, 9, n)], id="a list"),
    ],
)
def test_sane_transcripts_of_30_seconds_pass(ids: list[int]) -> None:
    guard = RepetitionGuard.for_speech(30)
    released = guard.push(ids) + guard.finish()
    assert guard.repetition is None
    assert released == ids


@given(st.floats(0, 30), UNITS)
def test_what_nobody_can_say_is_a_loop(seconds: float, unit: list[int]) -> None:
    guard = RepetitionGuard.for_speech(seconds)
    limit = max(MIN_TOKENS, round(SPOKEN_TOKENS_PER_SECOND * seconds))
    ids = (unit * limit)[:limit]
    guard.push(ids[:-1])
    assert guard.repetition is None
    guard.push(ids[-1:])
    assert guard.repetition is not None


@pytest.mark.parametrize(("unit", "found"), [(MAX_UNIT, True), (MAX_UNIT + 1, False)])
def test_longest_unit(unit: int, found: bool) -> None:
    guard = RepetitionGuard()
    guard.push(list(range(unit)) * (MIN_COPIES + 2))
    assert (guard.repetition is not None) == found


def test_ids_that_cannot_be_cut_are_not_held_back() -> None:
    guard = RepetitionGuard()
    assert guard.push([1, 2, 3, 4]) == [1, 2, 3, 4]
    assert guard.push([1, 2]) == []
    assert guard.push([9]) == [1, 2, 9]
