"""A code book that follows the vectors it quantizes, as running means (EMA)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RunningCodeBook:
    """Moves the rows of ``table`` to the means of the vectors that choose them.

    As published, ``counts`` [codes] is how often each is chosen per step, on average, and
    ``sums`` [codes, dim] the sum of those vectors. Codes chosen less often than ``dead_below``
    times the average begin anew at random vectors of the last step.
    """

    def __init__(self, table: nn.Embedding, decay: float, dead_below: float):
        self.table, self.decay, self.dead_below = table, decay, dead_below
        self.counts = torch.zeros(table.num_embeddings, device=table.weight.device)
        self.sums = torch.zeros_like(table.weight)
        self._chosen: list[Tensor] = []
        self._vectors: list[Tensor] = []

    def keep_table(self) -> None:
        """Begin from the table as it is, instead of with the first vectors."""
        self.counts.fill_(1.0)
        self.sums.copy_(self.table.weight)

    def collect(self, vectors: Tensor, codes: Tensor) -> None:
        """Note that ``vectors`` [n, dim] chose ``codes`` int64 [n]."""
        self._vectors.append(vectors.detach().float())
        self._chosen.append(codes)

    @torch.no_grad()
    def update(self) -> int:
        """Move the table by what was collected; the number of codes that began anew."""
        vectors, chosen = torch.cat(self._vectors), torch.cat(self._chosen)
        self._vectors, self._chosen = [], []
        begins = not bool(self.counts.any())
        share = 1.0 - self.decay
        ones = torch.ones(len(chosen), device=chosen.device)
        self.counts.lerp_(torch.zeros_like(self.counts).index_add_(0, chosen, ones), share)
        self.sums.lerp_(torch.zeros_like(self.sums).index_add_(0, chosen, vectors), share)
        average = self.counts.mean()
        dead = self.counts < self.dead_below * average
        if begins:
            dead = torch.ones_like(dead)
        places = dead.nonzero()[:, 0]
        picked = torch.randint(len(vectors), (len(places),)).to(vectors.device)
        self.counts[places] = average
        self.sums[places] = vectors[picked] * average
        used = self.counts > 0
        self.table.weight[used] = self.sums[used] / self.counts[used, None]
        return len(places)
