"""Recorded speech of Kokoro, and the prosody that it spoke with; see the folder's README."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.models.kokoro.recorded import RECORDED

FOLDER = RECORDED / "spoken"


@dataclass(frozen=True)
class Spoken:
    """A recording: its text, and the phonemes that were spoken in ``voice``."""

    name: str
    voice: str
    text: str
    phonemes: str

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.name}.wav"

    @property
    def durations(self) -> Tensor:
        return self._truth["durations"]

    @property
    def pitch(self) -> Tensor:
        return self._truth["pitch"]

    @property
    def energy(self) -> Tensor:
        return self._truth["energy"]

    @cached_property
    def _truth(self) -> dict[str, Tensor]:
        stored = load_file(FOLDER / "truth.safetensors")
        names = ("durations", "pitch", "energy")
        found = {name: stored[f"{self.name}.{name}"] for name in names}
        return {**found, "durations": found["durations"].to(torch.int64)}


SPOKEN = [Spoken(**values) for values in json.loads((FOLDER / "spoken.json").read_text())]
