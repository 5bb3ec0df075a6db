"""Short sounds that are no speech, generated from a seed: what "what do you hear" asks about."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kimia_infer.audio.files import SAMPLE_RATE
from scripts.miniature.surroundings import colored_noise

Chance = np.random.Generator

SECONDS = 0.8, 2.5
"""Shortest and longest clip."""

HELD_OUT_SEEDS = 1_000_000
"""Seeds of clips for measuring begin here."""


def clip(name: str, seed: int) -> np.ndarray:
    """Float32 [samples] at 16 kHz of a class of CLASSES."""
    chance = np.random.default_rng([seed, len(name)])
    samples = round(chance.uniform(*SECONDS) * SAMPLE_RATE)
    wave = CLASSES[name](samples, chance)
    floor = 10 ** chance.uniform(-4.5, -3) * chance.normal(size=samples)
    return (wave * chance.uniform(0.1, 0.7) + floor).astype(np.float32)


def _times(samples: int) -> np.ndarray:
    return np.arange(samples) / SAMPLE_RATE


def _sine(frequency: float, samples: int, chance: Chance) -> np.ndarray:
    return np.sin(2 * np.pi * (frequency * _times(samples) + chance.uniform()))


def _repeated(
    hit: Callable[[], np.ndarray], samples: int, gap: float, chance: Chance
) -> np.ndarray:
    """``hit`` about every ``gap`` seconds, the first one soon."""
    wave, place = np.zeros(samples), chance.uniform(0.0, 0.3)
    while (start := round(place * SAMPLE_RATE)) < samples - SAMPLE_RATE // 10:
        one = hit()[: samples - start]
        wave[start : start + len(one)] += chance.uniform(0.7, 1.0) * one
        place += gap * chance.uniform(0.9, 1.1)
    return wave


def _claps(samples: int, chance: Chance) -> np.ndarray:
    def hit() -> np.ndarray:
        length = round(chance.uniform(0.06, 0.15) * SAMPLE_RATE)
        noise = np.diff(chance.normal(size=length + 1))
        return noise * np.exp(-_times(length) * chance.uniform(50, 120)) / 2

    return _repeated(hit, samples, chance.choice([9.0, 0.3, 0.5]), chance)


def _knocks(samples: int, chance: Chance) -> np.ndarray:
    pitch = chance.uniform(90, 250)

    def hit() -> np.ndarray:
        length = SAMPLE_RATE // 8
        body = _sine(pitch, length, chance) + 0.3 * colored_noise(length, 1.5, chance)
        return body * np.exp(-_times(length) * chance.uniform(40, 80))

    return _repeated(hit, samples, chance.uniform(0.18, 0.3), chance)


def _tone(samples: int, chance: Chance) -> np.ndarray:
    base, falls = chance.uniform(200, 1500), chance.integers(1, 4)
    parts = [_sine(base * k, samples, chance) / k**2 for k in range(1, falls + 1)]
    return np.sum(parts, axis=0) / 1.5


def _beeps(samples: int, chance: Chance) -> np.ndarray:
    base, length = chance.uniform(800, 2500), round(chance.uniform(0.08, 0.2) * SAMPLE_RATE)
    return _repeated(
        lambda: _sine(base, length, chance) * np.hanning(length) ** 0.2,
        samples, chance.uniform(0.3, 0.6), chance,
    )  # fmt: skip


def _music(samples: int, chance: Chance) -> np.ndarray:
    """Chords of a key, one after another, as plucked strings or an organ have them."""
    root, plucked = chance.uniform(110, 220), chance.uniform(0.5, 4)
    wave, step = np.zeros(samples), round(chance.uniform(0.3, 0.7) * SAMPLE_RATE)
    for start in range(0, samples, step):
        length = min(step, samples - start)
        degree = chance.choice([0, 3, 5, 7, 9])
        for interval in (0, 4 if degree in (0, 5, 7) else 3, 7):
            pitch = root * 2 ** ((degree + interval) / 12)
            note = np.sum([_sine(pitch * k, length, chance) / k for k in range(1, 5)], axis=0)
            wave[start : start + length] += note * np.exp(-_times(length) * plucked) / 6
    return wave


def _noise(samples: int, chance: Chance) -> np.ndarray:
    return 0.3 * colored_noise(samples, chance.uniform(0.0, 1.5), chance)


def _siren(samples: int, chance: Chance) -> np.ndarray:
    middle, rate = chance.uniform(600, 1000), chance.uniform(0.6, 2.0)
    bend = np.sin(2 * np.pi * (rate * _times(samples) + chance.uniform()))
    return np.sin(2 * np.pi * np.cumsum(middle * (1 + 0.4 * bend)) / SAMPLE_RATE)


def _bell(samples: int, chance: Chance) -> np.ndarray:
    base = chance.uniform(500, 1200)

    def hit() -> np.ndarray:
        parts = ((1.0, 2.0), (2.0, 3.0), (2.76, 4.0), (5.4, 7.0))
        fades = [
            _sine(base * ratio, samples, chance) * np.exp(-_times(samples) * fall)
            for ratio, fall in parts
        ]
        return np.sum(fades, axis=0) / 2.5

    return _repeated(hit, samples, chance.choice([9.0, 0.8]), chance)


def _silence(samples: int, chance: Chance) -> np.ndarray:
    return np.zeros(samples)


CLASSES: dict[str, Callable[[int, Chance], np.ndarray]] = {
    "a clap": _claps,
    "a knock": _knocks,
    "a tone": _tone,
    "a beep": _beeps,
    "music": _music,
    "noise": _noise,
    "a siren": _siren,
    "a bell": _bell,
    "silence": _silence,
}
"""What is heard, in words, and how it is made."""

ASKED = ("what do you hear", "what is this sound", "which sound is this")
"""How people ask about a clip."""
