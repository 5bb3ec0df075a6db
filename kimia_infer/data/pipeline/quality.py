"""How good a segment sounds: level, clipping, bandwidth, and what listeners would say of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kimia_infer.audio.files import SAMPLE_RATE, loudest_dbfs
from kimia_infer.data.pipeline.models import QUALITY_NAME

SCORED_SAMPLES = 144_160
"""What DNSMOS hears at a time, 9.01 s; shorter speech is repeated."""
OVERALL = np.poly1d([-0.06766283, 1.11546468, 0.04602535])
"""From the network's third value to the scale of listeners, 1 to 5 (published with DNSMOS)."""

FLAT_SHARE, FLAT_SAMPLES = 0.99, 3
"""Clipped are so many samples in a row that are within 1 % of the highest."""

BAND_DB = 55.0
"""How far below the loudest band of a recording its highest audible frequency is."""
BAND_WINDOW = 512  # samples; bands are 31 Hz wide


@dataclass(frozen=True)
class Quality:
    """Of a segment.

    ``level_dbfs`` is that of its loudest 100 ms, ``clipped`` a share of its samples, and
    ``bandwidth_hz`` the highest frequency that is heard. ``score`` is what DNSMOS guesses that
    listeners would give, 1 to 5.
    """

    level_dbfs: float
    clipped: float
    bandwidth_hz: float
    score: float


class QualityMeter:
    """Measures segments; ``directory`` has the network, see ``models.py``.

    DNSMOS is run here as its package, of 2023, imports librosa and a web client for it. Raises
    ImportError without onnxruntime.
    """

    def __init__(self, directory: Path):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            str(directory / QUALITY_NAME), options, providers=["CPUExecutionProvider"]
        )
        self._input = self._session.get_inputs()[0].name

    def measure(self, wave: np.ndarray) -> Quality:
        """Of float32 [samples] at 16 kHz, at least one."""
        return Quality(
            loudest_dbfs(wave, SAMPLE_RATE), clipped_share(wave), bandwidth(wave), self._score(wave)
        )

    def _score(self, wave: np.ndarray) -> float:
        if len(wave) < SCORED_SAMPLES:
            wave = np.tile(wave, -(-SCORED_SAMPLES // len(wave)))
        # Pieces of one length, evenly from all of it.
        count = len(wave) // SCORED_SAMPLES
        starts = np.linspace(0, len(wave) - SCORED_SAMPLES, count).astype(int)
        pieces = [wave[None, start : start + SCORED_SAMPLES] for start in starts.tolist()]
        found = [self._session.run(None, {self._input: piece})[0] for piece in pieces]
        return float(OVERALL(np.mean([np.asarray(values)[0, 2] for values in found])))


def clipped_share(wave: np.ndarray) -> float:
    """The share of samples [samples] that stand at the highest or lowest value in a row."""
    peak = np.abs(wave).max(initial=0.0)
    if not peak:
        return 0.0
    clipped = 0
    for high in (wave >= FLAT_SHARE * peak, wave <= -FLAT_SHARE * peak):
        edges = np.flatnonzero(np.diff(high.astype(np.int8), prepend=0, append=0))
        lengths = edges[1::2] - edges[::2]
        clipped += int(lengths[lengths >= FLAT_SAMPLES].sum())
    return clipped / len(wave)


def bandwidth(wave: np.ndarray) -> float:
    """The highest frequency in Hz at which [samples] are not BAND_DB below the loudest band."""
    if len(wave) < BAND_WINDOW:
        wave = np.pad(wave, (0, BAND_WINDOW - len(wave)))
    frames = wave[: len(wave) // BAND_WINDOW * BAND_WINDOW].reshape(-1, BAND_WINDOW)
    power = (np.abs(np.fft.rfft(frames * np.hanning(BAND_WINDOW))) ** 2).mean(0)
    power = np.convolve(power, np.ones(5) / 5, "same")
    heard = np.flatnonzero(power > power.max() * 10 ** (-BAND_DB / 10))
    return float(heard[-1] * SAMPLE_RATE / BAND_WINDOW) if len(heard) else 0.0
