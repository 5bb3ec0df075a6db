"""Recordings for tests, as the bytes of 16-bit wav files."""

from __future__ import annotations

import io
import wave
from pathlib import Path

import numpy as np

from kimia_infer.audio.files import SAMPLE_RATE, load_audio


def wav_bytes(samples: np.ndarray, rate: int = SAMPLE_RATE) -> bytes:
    """A mono wav file of samples within [-1, 1]."""
    pcm = np.clip(np.rint(samples * 32_768), -32_768, 32_767).astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((1, 2, rate, 0, "NONE", ""))
        writer.writeframes(pcm.tobytes())
    return file.getvalue()


def noise(seconds: float, rate: int = SAMPLE_RATE, seed: int = 0) -> np.ndarray:
    """Noise whose loudness wanders like that of speech."""
    samples = round(seconds * rate)
    rng = np.random.default_rng(seed)
    loudness = np.repeat(rng.uniform(0, 0.2, samples // (rate // 5) + 1), rate // 5)
    return (rng.standard_normal(samples) * loudness[:samples]).astype(np.float32)


def recording(golden: Path, seconds: float, seed: int = 0) -> np.ndarray:
    """The recorded sounds of the tests in random order, with pauses, for so long."""
    sounds = [load_audio(path) for path in sorted((golden / "e2e" / "audio").glob("*.wav"))]
    rng = np.random.default_rng(seed)
    parts: list[np.ndarray] = []
    total, wanted = 0, round(seconds * SAMPLE_RATE)
    while total < wanted:
        sound = sounds[rng.integers(len(sounds))]
        pause = np.zeros(rng.integers(SAMPLE_RATE), dtype=np.float32)
        parts += [sound, pause]
        total += len(sound) + len(pause)
    return np.concatenate(parts)[:wanted]
