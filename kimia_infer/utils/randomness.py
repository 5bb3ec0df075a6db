"""Randomness as a pure function of the seed and of what it is for.

Every draw has an address: (seed, track, step) for tokens, (seed, chunk) for the noise that a
speech chunk starts from. A request therefore gives the same answer on the same machine
whatever is computed ahead, skipped or batched. The counter-based Philox generator makes the
address the key; it is part of NumPy's stable stream guarantee.
"""

from __future__ import annotations

import secrets
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

Track = Literal["text", "audio"]

# What every client's integers can hold, so that a drawn seed can be sent back.
MAX_SEED = 2**32 - 1
_TRACK_STREAMS: dict[Track, int] = {"text": 0, "audio": 1}
_FIRST_CHUNK_STREAM = len(_TRACK_STREAMS)


class Randomness(Protocol):
    """Where the decode loop and the detokenizer take their random numbers from."""

    def uniforms(self, track: Track, steps: int) -> Tensor:
        """float64 [steps] in [0, 1): the draw of every decode step of a track."""

    def noise(self, chunk: int, frames: int, channels: int) -> Tensor:
        """float32 [frames, channels], standard normal: the start of a speech chunk."""


class SeededRandomness:
    """The randomness of one request, from one seed."""

    def __init__(self, seed: int | None = None):
        """``seed`` in 0 .. 2**32 - 1; None draws one from the operating system."""
        self.seed = secrets.randbelow(MAX_SEED + 1) if seed is None else seed

    def _generator(self, stream: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self.seed, stream]))

    def uniforms(self, track: Track, steps: int) -> Tensor:
        return torch.from_numpy(self._generator(_TRACK_STREAMS[track]).random(steps))

    def noise(self, chunk: int, frames: int, channels: int) -> Tensor:
        generator = self._generator(_FIRST_CHUNK_STREAM + chunk)
        return torch.from_numpy(generator.standard_normal((frames, channels), dtype=np.float32))
