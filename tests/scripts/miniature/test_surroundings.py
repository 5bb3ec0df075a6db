"""Surroundings: each does what it says, and the same each time."""

from __future__ import annotations

import random

import numpy as np
import pytest

from kimia_infer.audio.files import SAMPLE_RATE
from scripts.miniature.surroundings import (
    Room,
    Surroundings,
    colored_noise,
    draw_surroundings,
    impulse_response,
)

SECOND = np.arange(SAMPLE_RATE) / SAMPLE_RATE
TONES = 0.2 * (np.sin(2 * np.pi * 500 * SECOND) + np.sin(2 * np.pi * 6000 * SECOND))


def level(wave: np.ndarray, frequency: float) -> float:
    """Amplitude at a frequency in Hz."""
    time = np.arange(len(wave)) / SAMPLE_RATE
    return float(2 * np.abs(np.mean(wave * np.exp(-2j * np.pi * frequency * time))))


def test_nothing_changes_by_default():
    np.testing.assert_allclose(Surroundings().heard(TONES, 0), TONES, atol=1e-6)


def test_drawn_surroundings_are_repeatable_and_different():
    drawn = [draw_surroundings(random.Random(seed)) for seed in range(40)]
    assert drawn == [draw_surroundings(random.Random(seed)) for seed in range(40)]
    waves = [surroundings.heard(TONES, 1) for surroundings in drawn]
    assert all(np.array_equal(s.heard(TONES, 1), w) for s, w in zip(drawn[:5], waves, strict=False))
    assert all(w.dtype == np.float32 and np.abs(w).max() <= 1 and w.any() for w in waves)
    assert len({w.tobytes() for w in waves}) == len(waves)


def test_silence_around_and_a_missing_start():
    whole = Surroundings(before=0.5, after=0.25).heard(TONES, 0)
    assert len(whole) == 1.75 * SAMPLE_RATE
    assert not whole[: SAMPLE_RATE // 2].any() and not whole[-SAMPLE_RATE // 4 :].any()
    cut = Surroundings(before=-0.25).heard(TONES, 0)
    np.testing.assert_allclose(cut, TONES[SAMPLE_RATE // 4 :], atol=1e-6)


def test_bands_are_limited():
    narrow = Surroundings(band=3000.0).heard(TONES, 0)
    assert level(narrow, 500) > 0.19 and level(narrow, 6000) < 0.001
    line = Surroundings(telephone=True).heard(TONES, 0)
    assert level(line, 500) == pytest.approx(0.2, abs=0.02) and level(line, 6000) < 0.01


def test_noise_is_as_loud_as_said():
    heard = Surroundings(ratio=10.0, color=2.0).heard(TONES, 3)
    ratio = np.mean(TONES**2) / np.mean((heard - TONES) ** 2)
    assert 10 * np.log10(ratio) == pytest.approx(10.0, abs=0.1)
    powers = [
        np.abs(np.fft.rfft(colored_noise(SAMPLE_RATE, color, np.random.default_rng(0)))) ** 2
        for color in (0.0, 2.0)
    ]
    low, high = ([p[200:400].mean(), p[3200:6400].mean()] for p in powers)
    assert low[0] / low[1] == pytest.approx(1.0, rel=0.2)
    assert high[0] / high[1] == pytest.approx(256.0, rel=0.4)


def test_a_room_rings_until_its_decay():
    near, far = (
        impulse_response(Room(0.4, distance), np.random.default_rng(0)) for distance in (0.3, 3.0)
    )
    assert near[0] > 0.5 and len(near) == 0.4 * SAMPLE_RATE
    assert np.sum(far[1:] ** 2) > 50 * np.sum(near[1:] ** 2)
    early, late = (np.mean(far[at : at + 800] ** 2) for at in (400, 4400))
    assert 10 * np.log10(early / late) == pytest.approx(60 * 0.25 / 0.4, abs=4)


def test_speed_shortens():
    assert len(Surroundings(speed=1.25).heard(TONES, 0)) == pytest.approx(0.8 * SAMPLE_RATE, abs=2)
