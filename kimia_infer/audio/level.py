"""How loud a sound is, and whether there is anything in it."""

from __future__ import annotations

import numpy as np

WINDOW_SECONDS = 0.1
"""Loudness is looked at over windows of about a syllable's length."""

SILENCE_DBFS = -70.0
"""A sound whose loudest window is quieter counts as silent.

That is an RMS of ten steps of 16-bit PCM: above digital silence, dither and the noise of a muted
microphone (-100 to -80 dBFS), and far below the quietest recordings of speech that can still
be understood (about -50 dBFS). The loudest window counts, not the mean, so that one word in
minutes of silence is not lost.
"""

FLOOR_DBFS = -120.0
"""Levels below are given as this, so that digital silence has a finite level."""


def loudest_dbfs(wave: np.ndarray, sample_rate: int) -> float:
    """RMS level of the loudest 100 ms of ``wave`` [samples], in dB of full scale (amplitude 1).

    Windows follow each other every 50 ms, the last ends with the wave; a shorter wave is one
    window. ValueError if there are no samples.
    """
    if not len(wave):
        raise ValueError("a sound without samples has no level")
    half = min(len(wave), max(1, round(WINDOW_SECONDS * sample_rate / 2)))
    blocks = wave[: len(wave) // half * half].reshape(-1, half)
    energy = np.einsum("ij,ij->i", blocks, blocks, dtype=np.float64)  # without a copy
    pairs = energy[:-1] + energy[1:]
    last = np.square(wave[-2 * half :], dtype=np.float64).mean()
    power = max(last, pairs.max(initial=0.0) / (2 * half))
    return max(FLOOR_DBFS, 10 * float(np.log10(power))) if power > 0 else FLOOR_DBFS


def is_silent(level_dbfs: float) -> bool:
    """Whether a sound of that loudest level counts as silent."""
    return level_dbfs < SILENCE_DBFS
