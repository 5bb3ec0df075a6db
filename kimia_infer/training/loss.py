"""The published fine-tuning loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

SMOOTHING = 1e-4
"""Added to the number of positions that count (published fine-tuning code)."""

CHUNK_POSITIONS = 256
"""Positions whose logits exist at a time: 0.17 GB in float32 at the published vocabulary."""


class TrackLosses(NamedTuple):
    """Losses of every sample, float32 [batch]; their sum is what is trained."""

    audio: Tensor
    text: Tensor

    @property
    def total(self) -> Tensor:
        return self.audio + self.text


def track_loss(hidden: Tensor, head: nn.Module, labels: Tensor, mask: Tensor) -> Tensor:
    """Mean cross entropy of one track, float32 [batch]: sum(ce * mask) / (sum(mask) + 1e-4).

    hidden [batch, length, hidden_size]; labels int64 and mask bool [batch, length]. Logits are
    computed only where the mask holds, in chunks that the backward pass computes again. A
    sample without such a position has the loss 0, and zero gradients.
    """
    states, targets = hidden[mask], labels[mask]
    entropies = [
        checkpoint(_cross_entropy, part, head, target, use_reentrant=False)
        for part, target in zip(
            states.split(CHUNK_POSITIONS), targets.split(CHUNK_POSITIONS), strict=True
        )
    ]
    rows = mask.nonzero()[:, 0]
    sums = torch.zeros(len(mask), device=hidden.device).index_add(0, rows, torch.cat(entropies))
    return sums / (mask.sum(dim=1) + SMOOTHING)


def _cross_entropy(states: Tensor, head: nn.Module, labels: Tensor) -> Tensor:
    return F.cross_entropy(head(states).float(), labels, reduction="none")
