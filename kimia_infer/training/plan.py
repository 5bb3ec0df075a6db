"""Which samples each step uses: a function of seed and step, so that a run can be resumed."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

POOL_STEPS = 50
"""Steps whose samples are sorted by length together; more save padding, fewer shuffle better."""


@dataclass(frozen=True)
class MicroBatch:
    """Indices of the samples of one forward pass and their weights in the loss of the step."""

    indices: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class StepPlan:
    """Divides ``samples`` into steps of equal size, of which an epoch's last may be smaller.

    Every sample of a step counts the same, whatever number of processes and passes shares it.
    A process that gets no sample of a pass repeats one that counts nothing, because all have to
    take part. With ``lengths``, one for each sample, those of similar length share a step.
    """

    samples: int
    batch_size: int
    accumulation: int
    processes: int
    seed: int
    shuffle: bool = True
    lengths: Sequence[int] | None = None

    @property
    def step_size(self) -> int:
        return self.batch_size * self.accumulation * self.processes

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.samples / self.step_size)

    def micro_batches(self, step: int, rank: int) -> list[MicroBatch]:
        """The passes of process ``rank`` in step ``step``, which counts from 0."""
        indices = self._indices(*divmod(step, self.steps_per_epoch))
        passes = []
        for start in range(0, len(indices), self.batch_size * self.processes):
            first = start + rank * self.batch_size
            mine = indices[first : first + self.batch_size]
            # Gradients are averaged over processes, hence the factor.
            weight = self.processes / len(indices) if mine else 0.0
            mine = mine or indices[:1]
            passes.append(MicroBatch(mine, (weight,) * len(mine)))
        return passes

    def _indices(self, epoch: int, place: int) -> tuple[int, ...]:
        """The samples of the step at ``place`` of an epoch."""
        order = _order(self.samples, self.seed + epoch if self.shuffle else None)
        size = self.step_size
        if self.lengths is None:
            return order[place * size : (place + 1) * size]
        pool, place = divmod(place, POOL_STEPS)
        members = order[pool * POOL_STEPS * size : (pool + 1) * POOL_STEPS * size]
        members = sorted(members, key=self.lengths.__getitem__)
        places = _order(len(members) // size, zlib.crc32(f"{self.seed} {epoch} {pool}".encode()))
        group = places[place] if place < len(places) else place  # a smaller one stays last
        return tuple(members[group * size : (group + 1) * size])


@lru_cache(maxsize=4)
def _order(samples: int, seed: int | None) -> tuple[int, ...]:
    if seed is None:
        return tuple(range(samples))
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randperm(samples, generator=generator).tolist())


def learning_rate_factor(step: int, steps: int, warmup_ratio: float) -> float:
    """Factor of the largest rate in step ``step``, which counts from 0, of ``steps``.

    A linear rise, whose first step is not 0, then half a cosine that ends beyond the last step.
    """
    warmup = math.ceil(steps * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
