"""Recorded random numbers in place of a seeded generator."""

from __future__ import annotations

import torch
from torch import Tensor


class RecordedRandomness:
    """Replays recorded uniforms, addressed by (track, step), and recorded chunk noise."""

    def __init__(self, uniforms: dict[tuple[str, int], float], noise: dict[int, Tensor]):
        self._uniforms, self._noise = uniforms, noise

    def uniforms(self, track: str, steps: int) -> Tensor:
        values = [self._uniforms.get((track, step), 0.0) for step in range(steps)]
        return torch.tensor(values, dtype=torch.float64)

    def noise(self, chunk: int, frames: int, channels: int) -> Tensor:
        recorded = self._noise[chunk].float()
        assert recorded.shape == (frames, channels)
        return recorded
