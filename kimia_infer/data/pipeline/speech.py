"""Where there is speech in a recording, by silero-vad."""

from __future__ import annotations

import warnings

import numpy as np
import torch

from kimia_infer.audio.files import SAMPLE_RATE

PAUSE_MS, SHORTEST_MS = 200, 250
PAD_MS = 100
"""Added before and after, as the first and last sounds of words are quiet."""


class SpeechDetector:
    """The model, loaded once; raises ImportError without the package."""

    def __init__(self) -> None:
        threads = torch.get_num_threads()
        from silero_vad import get_speech_timestamps, load_silero_vad  # sets the threads to 1

        torch.set_num_threads(threads)
        self._find = get_speech_timestamps
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.jit.load` is deprecated", FutureWarning)
            self._model = load_silero_vad()

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
