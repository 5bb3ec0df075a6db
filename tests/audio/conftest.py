"""The sound that most files here are made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.audio.sounds import pcm, tone, wav


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seconds of a stereo tone at 44.1 kHz."""
    path = tmp_path_factory.mktemp("source") / "tone.wav"
    stereo = np.repeat(tone(2.0, 44_100)[:, None], 2, axis=1)
    path.write_bytes(wav(pcm(stereo), channels=2, rate=44_100))
    return path
