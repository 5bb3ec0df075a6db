"""Long recordings are cut at their quietest points, and nothing is lost."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimia_infer.audio.split import split_at_quiet

RATE = 1000
BLOCK, WINDOW = RATE // 100, RATE // 10
LONGEST, SEARCH, LAST = 30 * RATE, 5 * RATE, RATE


def noise(samples: int, seed: int) -> np.ndarray:
    """Noise whose loudness wanders, with a few digital silences."""
    rng = np.random.default_rng(seed)
    wave = (
        rng.standard_normal(samples) * rng.uniform(0, 1, samples // 500 + 1).repeat(500)[:samples]
    )
    for start in rng.integers(0, max(1, samples), 4):
        wave[start : start + rng.integers(0, 2 * RATE)] = 0
    return wave.astype(np.float32)


@given(st.integers(1, 200 * RATE), st.integers(0, 1000))
def test_segments_cover_the_recording_in_order(samples: int, seed: int) -> None:
    segments = split_at_quiet(noise(samples, seed), RATE)
    assert segments[0][0] == 0
    assert segments[-1][1] == samples
    for (_, end), (start, _) in itertools.pairwise(segments):
        assert end == start
    lengths = [end - start for start, end in segments]
    assert all(0 < length <= LONGEST for length in lengths)
    assert all(length >= LONGEST - SEARCH for length in lengths[:-1])
    assert lengths[-1] >= min(LAST, samples)


@given(st.integers(LONGEST + 1, 100 * RATE), st.integers(0, 1000))
def test_every_cut_is_at_the_quietest_point(samples: int, seed: int) -> None:
    wave = noise(samples, seed)
    for start, cut in split_at_quiet(wave, RATE)[:-1]:
        begin = start + LONGEST - SEARCH
        end = min(start + LONGEST, samples - LAST)
        places = range(begin, end - WINDOW + 1, BLOCK)
        energy = [float(np.square(wave[p : p + WINDOW], dtype=np.float64).sum()) for p in places]
        chosen = float(np.square(wave[cut - WINDOW // 2 :][:WINDOW], dtype=np.float64).sum())
        assert chosen == pytest.approx(min(energy), rel=1e-9, abs=1e-12)


def test_a_pause_is_found_to_the_hundredth_of_a_second() -> None:
    wave = np.random.default_rng(0).standard_normal(40 * RATE).astype(np.float32)
    wave[27_300:27_400] = 0
    assert split_at_quiet(wave, RATE) == [(0, 27_350), (27_350, 40_000)]


@pytest.mark.parametrize("samples", [1, LONGEST - 1, LONGEST])
def test_what_fits_is_not_cut(samples: int) -> None:
    assert split_at_quiet(np.zeros(samples, np.float32), RATE) == [(0, samples)]


def test_a_little_more_than_fits_leaves_no_scrap() -> None:
    (_, cut), (start, end) = split_at_quiet(np.zeros(LONGEST + 1, np.float32), RATE)
    assert cut == start
    assert LAST <= end - start <= LAST + WINDOW


def test_other_sizes() -> None:
    wave = noise(20 * RATE, 1)
    segments = split_at_quiet(wave, RATE, longest=3, search=1, last=0.5)
    assert max(end - start for start, end in segments) <= 3 * RATE
    with pytest.raises(ValueError, match="search"):
        split_at_quiet(wave, RATE, longest=3, search=4)
    with pytest.raises(ValueError, match="search"):
        split_at_quiet(wave, RATE, longest=3, search=1, last=0.9)
