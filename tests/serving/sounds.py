"""Comparison of the sound of two answers."""

from __future__ import annotations

import numpy as np


def same_sound(one: bytes, other: bytes) -> bool:
    """Whether 16-bit samples are equal but for rounding.

    Chunks that are computed together differ by less than 1e-5 of full scale.
    """
    if len(one) != len(other):
        return False
    first, second = (np.frombuffer(sound, "<i2").astype(int) for sound in (one, other))
    return bool(np.abs(first - second).max(initial=0) <= 1)
