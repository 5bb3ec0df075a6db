"""Recordings that are made, so that who speaks when is known."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kimia_infer.audio.files import SAMPLE_RATE
from kimia_infer.data.pipeline.turns import Turn

FRAME = 160  # samples, 10 ms
QUIET_DB = 38.0
"""Below the loudest 10 ms of an utterance: nothing is said."""
PAUSE_FRAMES = 35
"""Longer pauses in an utterance are the end of a turn."""


@dataclass(frozen=True)
class Utterance:
    """float32 [samples] at 16 kHz of one voice."""

    wave: np.ndarray
    voice: str
    text: str = ""


@dataclass
class Recording:
    """What was joined, and the truth about it. ``said`` are texts with the times of utterances."""

    wave: np.ndarray
    turns: list[Turn] = field(default_factory=list)
    said: list[tuple[float, float, str, str]] = field(default_factory=list)


def runs(wave: np.ndarray) -> list[tuple[int, int]]:
    """Where there is speech in a clean utterance, in samples."""
    frames = wave[: len(wave) // FRAME * FRAME].reshape(-1, FRAME)
    power = np.convolve((frames.astype(np.float64) ** 2).mean(1), np.ones(3) / 3, "same")
    loud = np.flatnonzero(power > power.max() * 10 ** (-QUIET_DB / 10))
    found: list[list[int]] = []
    for frame in loud.tolist():
        if found and frame - found[-1][1] <= PAUSE_FRAMES:
            found[-1][1] = frame + 1
        else:
            found.append([frame, frame + 1])
    return [(begin * FRAME, end * FRAME) for begin, end in found]


def trimmed(utterance: Utterance) -> Utterance:
    """Without the silence before and after, at a usual level."""
    speech = runs(utterance.wave)
    wave = utterance.wave[speech[0][0] : speech[-1][1]]
    wave = wave * (0.08 / np.sqrt(np.mean(wave.astype(np.float64) ** 2)))
    return Utterance(wave.astype(np.float32), utterance.voice, utterance.text)


def noise(samples: int, seed: int, color: float = 1.0) -> np.ndarray:
    """Noise of power 1 / f ** color and a mean square of 1, float64 [samples]."""
    spectrum = np.fft.rfft(np.random.default_rng(seed).normal(size=samples))
    frequencies = np.maximum(np.fft.rfftfreq(samples, 1 / SAMPLE_RATE), 50.0)
    found = np.fft.irfft(spectrum * frequencies ** (-color / 2), samples)
    return found / np.sqrt(np.mean(found**2))


def music(samples: int, seed: int) -> np.ndarray:
    """Chords that are struck and fade, float64 [samples], peak about 0.2."""
    chance = random.Random(seed)
    time = np.arange(samples) / SAMPLE_RATE
    found = np.zeros(samples)
    for begin in np.arange(0, samples / SAMPLE_RATE, 0.5):
        root = 110.0 * 2 ** (chance.choice((0, 3, 5, 7, 10)) / 12)
        fade = np.where(time >= begin, np.exp(-3 * (time - begin).clip(0)), 0.0)
        for ratio in (1.0, 1.26, 1.5, 2.0):
            for harmonic in (1, 2, 3):
                tone = np.sin(2 * np.pi * root * ratio * harmonic * time)
                found += fade * tone / harmonic**2
    return 0.2 * found / np.abs(found).max()


def conversation(
    utterances: Sequence[Utterance], seed: int, seconds: float, noise_db: float = -30.0
) -> Recording:
    """The utterances in turns, in random order, until the recording is ``seconds`` long.

    One turn in eight begins before the one before it has ended. Music, and silence, of three to
    five seconds each stand between some. ``noise_db`` is the level of pink noise against speech.
    """
    chance = random.Random(seed)
    total = round(seconds * SAMPLE_RATE)
    wave = np.zeros(total)
    made = Recording(wave)
    names: dict[str, int] = {}
    order: list[Utterance] = []
    place, until, last = round(0.5 * SAMPLE_RATE), 0, ""
    while True:
        order = order or chance.sample(list(utterances), len(utterances))
        utterance = order.pop()
        gap = chance.uniform(0.15, 1.2)
        if utterance.voice != last and last and chance.random() < 0.125:
            gap = -chance.uniform(0.4, 1.0)
        elif chance.random() < 0.08:
            gap = chance.uniform(3.0, 5.0)
            if chance.random() < 0.5 and place + round(gap * SAMPLE_RATE) < total:
                samples = round((gap - 0.4) * SAMPLE_RATE)
                begin = place + round(0.2 * SAMPLE_RATE)
                wave[begin : begin + samples] += music(samples, chance.randrange(2**31))
        start = max(round(place + gap * SAMPLE_RATE), until, 0)
        end = start + len(utterance.wave)
        if end + SAMPLE_RATE // 2 > total:
            break
        wave[start:end] += utterance.wave
        speaker = names.setdefault(utterance.voice, len(names))
        for begin, stop in runs(utterance.wave):
            made.turns.append(
                Turn((start + begin) / SAMPLE_RATE, (start + stop) / SAMPLE_RATE, speaker)
            )
        times = start / SAMPLE_RATE, end / SAMPLE_RATE
        made.said.append((*times, utterance.voice, utterance.text))
        # Nobody begins twice before a third is done.
        until, place, last = place, max(place, end), utterance.voice
    wave += noise(total, seed) * 0.08 * 10 ** (noise_db / 20)
    made.wave = np.clip(wave, -1, 1).astype(np.float32)
    made.turns.sort(key=lambda turn: turn.start)
    return made
