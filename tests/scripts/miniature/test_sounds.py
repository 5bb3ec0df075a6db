"""Sounds that are no speech: each its own, the same each time, and as it is called."""

from __future__ import annotations

import numpy as np
import pytest

from kimia_infer.audio.files import SAMPLE_RATE
from scripts.miniature.sounds import CLASSES, clip


@pytest.mark.parametrize("name", CLASSES)
def test_sounds_differ_by_their_seeds(name: str):
    waves = [clip(name, seed) for seed in range(6)]
    assert all(0.8 * SAMPLE_RATE <= len(w) <= 2.5 * SAMPLE_RATE for w in waves)
    assert all(w.dtype == np.float32 and np.abs(w).max() < 1.5 for w in waves)
    assert len({w.tobytes() for w in waves}) == 6
    assert np.array_equal(waves[0], clip(name, 0))


def test_sounds_are_what_they_are_called():
    loudest = {name: np.abs(clip(name, 1)).max() for name in CLASSES}
    assert loudest["silence"] < 0.02 < 0.05 < min(v for k, v in loudest.items() if k != "silence")
    for name, share in (("a tone", 0.6), ("noise", 0.0)):
        power = np.abs(np.fft.rfft(clip(name, 2))) ** 2
        strongest = np.sort(power)[-20:].sum() / power.sum()
        assert strongest > share if share else strongest < 0.3
