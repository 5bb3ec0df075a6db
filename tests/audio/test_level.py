"""The level of a sound's loudest moment."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimia_infer.audio.files import FLOOR_DBFS, SILENCE_DBFS, is_silent, loudest_dbfs

RATE = 1000
WINDOW = RATE // 10


def sine(amplitude: float, seconds: float = 1.0) -> np.ndarray:
    wave = np.sin(2 * np.pi * 50 * np.arange(round(RATE * seconds)) / RATE)
    return (amplitude * wave).astype(np.float32)


@pytest.mark.parametrize("amplitude", [1.0, 0.1, 1e-3, 1e-4])
def test_a_sine_has_its_rms_level(amplitude: float) -> None:
    expected = 20 * np.log10(amplitude / np.sqrt(2))
    assert loudest_dbfs(sine(amplitude), RATE) == pytest.approx(expected, abs=0.01)


@given(st.integers(0, 5_000))
def test_one_syllable_in_long_silence_is_heard(position: int) -> None:
    """Wherever it is, at least half a window of it counts: within 3 dB of its own level."""
    wave = np.zeros(5_000 + WINDOW, dtype=np.float32)
    wave[position : position + WINDOW] = sine(0.01, 0.1)
    level = loudest_dbfs(wave, RATE)
    assert 20 * np.log10(0.01 / np.sqrt(2)) - 3.1 <= level <= 20 * np.log10(0.01)
    assert not is_silent(level)


@given(st.integers(2, 400), st.integers(0, 10))
def test_against_every_window(samples: int, seed: int) -> None:
    wave = np.random.default_rng(seed).standard_normal(samples).astype(np.float32)
    inner = wave[5:-5] if samples > 100 else wave
    width = min(WINDOW, inner.size)
    every = [inner[i : i + width].var() for i in range(inner.size - width + 1)]
    loudest = 10 * np.log10(max(every))
    assert loudest - 3.1 <= loudest_dbfs(wave, RATE) <= loudest + 1e-3


@given(st.floats(-1, 1), st.integers(1, 5_000))
def test_a_constant_value_is_silent_and_changes_no_level(constant: float, samples: int) -> None:
    constant_wave = np.full(samples, constant, np.float32)
    assert is_silent(loudest_dbfs(constant_wave, RATE))
    level = loudest_dbfs(sine(0.1) + np.float32(constant), RATE)
    assert level == pytest.approx(loudest_dbfs(sine(0.1), RATE), abs=0.01)


def test_silence() -> None:
    assert loudest_dbfs(np.zeros(1, np.float32), RATE) == FLOOR_DBFS
    assert is_silent(FLOOR_DBFS)
    dither = np.random.default_rng(0).integers(-2, 3, 16_000).astype(np.float32) / 32_768
    assert is_silent(loudest_dbfs(dither, 16_000))
    assert not is_silent(SILENCE_DBFS)
    with pytest.raises(ValueError, match="samples"):
        loudest_dbfs(np.zeros(0, np.float32), RATE)
