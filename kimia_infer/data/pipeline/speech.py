"""Where there is speech in a recording, by silero-vad."""

from __future__ import annotations

import numpy as np
import torch

from kimia_infer.audio.files import SAMPLE_RATE
from kimia_infer.audio.silero import load_silero

PAUSE_MS, SHORTEST_MS = 200, 250
PAD_MS = 100
"""Added before and after, as the first and last sounds of words are quiet."""


class SpeechDetector:
    """The model, loaded once; raises ImportError without the package."""

    def __init__(self) -> None:
        self._model = load_silero()
        from silero_vad import get_speech_timestamps

        self._find = get_speech_timestamps

    def speech(self, wave: np.ndarray) -> list[tuple[float, float]]:
        """Start and end in seconds of speech in float32 [samples] at 16 kHz, in order."""
        found = self._find(
            torch.from_numpy(wave),
            self._model,
            sampling_rate=SAMPLE_RATE,
            min_silence_duration_ms=PAUSE_MS,
            min_speech_duration_ms=SHORTEST_MS,
            speech_pad_ms=PAD_MS,
        )
        return [(span["start"] / SAMPLE_RATE, span["end"] / SAMPLE_RATE) for span in found]
