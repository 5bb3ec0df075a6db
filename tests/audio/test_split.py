"""Long recordings are cut at their quietest points while they arrive, and nothing is lost."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimia_infer.audio.split import speech_within, split_at_quiet

RATE = 1000
BLOCK, WINDOW = RATE // 100, RATE // 10
LONGEST, SEARCH, SHORTEST = 30 * RATE, 5 * RATE, RATE

Segments = list[tuple[int, int]]


def noise(samples: int, seed: int) -> np.ndarray:
    """Noise whose loudness wanders, with a few digital silences."""
    rng = np.random.default_rng(seed)
    wave = (
        rng.standard_normal(samples) * rng.uniform(0, 1, samples // 500 + 1).repeat(500)[:samples]
    )
    for start in rng.integers(0, max(1, samples), 4):
        wave[start : start + rng.integers(0, 2 * RATE)] = 0
    return wave.astype(np.float32)


def in_blocks(wave: np.ndarray, most: int, seed: int = 0) -> Iterator[np.ndarray]:
    """The wave in blocks of up to ``most`` samples, some of them empty."""
    rng, start = np.random.default_rng(seed), 0
    while start < len(wave):
        size = int(rng.integers(0, most + 1))
        yield wave[start : start + size]
        start += size


def split(wave: np.ndarray, block: int = 10_007, **sizes: float) -> Segments:
    """Start and end of each segment, whose samples are compared with those of the wave."""
    segments = []
    for start, samples in split_at_quiet(in_blocks(wave, block), RATE, **sizes):
        np.testing.assert_array_equal(samples, wave[start : start + len(samples)])
        segments.append((start, start + len(samples)))
    return segments


def split_whole(wave: np.ndarray, most: int = LONGEST, region: int = SEARCH) -> Segments:
    """The same by looking at the whole wave, one window at a time."""
    cuts = [0]
    while len(wave) - cuts[-1] > most:
        rest = wave[cuts[-1] :]
        begin, end = max(most - region, SHORTEST), min(most, len(rest) - SHORTEST)
        places = range(begin, end - WINDOW + 1, BLOCK)
        energy = [float(np.square(rest[p : p + WINDOW], dtype=np.float64).sum()) for p in places]
        least = min(energy, default=0.0)
        quiet = [p for p, e in zip(places, energy, strict=True) if e <= least * (1 + 1e-9) + 1e-12]
        cuts.append(cuts[-1] + (quiet[-1] + WINDOW // 2 if quiet else (begin + end) // 2))
    return list(itertools.pairwise([*cuts, len(wave)]))


@given(st.integers(1, 130 * RATE), st.integers(0, 1000), st.integers(1, 50 * RATE))
def test_cuts_are_those_of_the_whole_recording(samples: int, seed: int, block: int) -> None:
    wave = noise(samples, seed)
    assert split(wave, max(block, 50)) == split_whole(wave)


@given(st.integers(2000, 30_000), st.integers(1, 60 * RATE), st.integers(0, 1000))
def test_segments_cover_the_recording_and_none_is_short(
    longest: int, samples: int, seed: int
) -> None:
    """Also where a model wants segments so short that the whole of each is searched."""
    wave, search = noise(samples, seed), min(SEARCH, longest)
    segments = split(wave, longest=longest / RATE, search=search / RATE)
    assert segments == split_whole(wave, longest, search)
    assert segments[0][0] == 0
    assert segments[-1][1] == samples
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(segments))
    lengths = [end - start for start, end in segments]
    assert max(lengths) <= longest
    assert all(length >= max(longest - search, SHORTEST) for length in lengths[:-1])
    assert lengths[-1] >= min(SHORTEST, samples)


def test_a_pause_is_found_to_the_hundredth_of_a_second() -> None:
    wave = np.random.default_rng(0).standard_normal(40 * RATE).astype(np.float32)
    wave[27_300:27_400] = 0
    assert split(wave) == [(0, 27_350), (27_350, 40_000)]


@pytest.mark.parametrize("samples", [1, LONGEST - 1, LONGEST])
def test_what_fits_is_not_cut(samples: int) -> None:
    assert split(np.zeros(samples, np.float32)) == [(0, samples)]


def test_a_little_more_than_fits_leaves_no_scrap() -> None:
    (_, cut), (start, end) = split(np.zeros(LONGEST + 1, np.float32))
    assert cut == start
    assert SHORTEST <= end - start <= SHORTEST + WINDOW


def test_no_more_is_taken_than_a_segment_needs() -> None:
    """Segments come while the recording is read, which may be endless."""
    taken = []

    def endless() -> Iterator[np.ndarray]:
        for number in itertools.count():
            taken.append(number)
            yield np.ones(RATE, np.float32)

    segments = split_at_quiet(endless(), RATE)
    for expected in range(1, 20):
        start, samples = next(segments)
        ahead = len(taken) * RATE - (start + len(samples))
        assert ahead <= SEARCH + 2 * SHORTEST, expected
    segments.close()


@pytest.mark.parametrize(
    "sizes",
    [(3, 4, 1), (3, 1, 0.9), (1.9, 1.9, 1)],
    ids=["search beyond segment", "no room to search", "segment of less than two"],
)
def test_impossible_sizes(sizes: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="search"):
        list(split_at_quiet([np.zeros(9)], RATE, *sizes))


@pytest.mark.parametrize("hiss", [0.0, 1e-4])
def test_where_speech_begins_and_ends(hiss: float) -> None:
    """To 20 ms, with a margin of 100 ms on both sides."""
    rng = np.random.default_rng(0)
    wave = hiss * rng.standard_normal(5 * RATE)
    wave[2 * RATE : 3 * RATE] += 0.1 * rng.standard_normal(RATE)
    begin, end = speech_within(wave, RATE)
    assert begin == pytest.approx(1.9 * RATE, abs=0.02 * RATE)
    assert end == pytest.approx(3.1 * RATE, abs=0.02 * RATE)


def test_speech_without_quiet_around_it_is_everything() -> None:
    rng = np.random.default_rng(0)
    for samples in (1, WINDOW - 1, WINDOW, 3 * RATE):
        assert speech_within(rng.standard_normal(samples), RATE) == (0, samples)
    assert speech_within(np.zeros(RATE), RATE) == (0, RATE)
