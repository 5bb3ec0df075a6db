"""What is said in a segment: what the pipeline asks of a recognizer, and Whisper as one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kimia_infer.utils.errors import WeightsError


@dataclass(frozen=True)
class Heard:
    """What a recognizer heard.

    ``language`` is a code of two letters and ``certainty`` its probability; None where the
    recognizer does not tell languages apart. ``confidence`` is the mean logarithm of the
    probabilities of the text's tokens, None where it is not known.
    """

    text: str
    language: str | None = None
    certainty: float | None = None
    confidence: float | None = None


class Recognizer(Protocol):
    """Writes down what is said. ``together`` calls at a time keep it busy; more wait."""

    name: str
    together: int

    def hear(self, wave: np.ndarray) -> Heard:
        """What is said in float32 [samples] at 16 kHz; a turn without a pause may exceed 30 s."""
        ...


Difference = Callable[[str, str, str | None], float]
"""The error rate of the first text against the second, in a language."""


class WhisperRecognizer:
    """Whisper, run by faster-whisper.

    Args:
        model: what faster-whisper takes, a directory or a name such as ``large-v3``.

    Raises ImportError without the package, WeightsError for a model that cannot be loaded.
    """

    together = 1

    def __init__(self, model: str):
        from faster_whisper import WhisperModel

        self.name = f"whisper {model}"
        try:
            # The fastest that the device has: 8 bits on a CPU.
            self._model = WhisperModel(model, compute_type="auto")
        except (ValueError, RuntimeError) as error:
            raise WeightsError(f"{self.name}: cannot be loaded: {error}") from error

    def hear(self, wave: np.ndarray) -> Heard:
        segments, info = self._model.transcribe(
            wave,
            beam_size=1,
            temperature=0.0,
            condition_on_previous_text=False,
            without_timestamps=True,
        )
        found = list(segments)
        text = " ".join(segment.text.strip() for segment in found).strip()
        tokens = sum(len(segment.tokens) for segment in found)
        sums = sum(segment.avg_logprob * len(segment.tokens) for segment in found)
        knows = self._model.model.is_multilingual
        return Heard(
            text,
            info.language if knows else None,
            info.language_probability if knows else None,
            sums / tokens if tokens else None,
        )
