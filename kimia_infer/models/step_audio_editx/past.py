"""What the layers of the flow know of the frames before those that they compute."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Kept = tuple[Tensor, ...]


class Past:
    """Joins a chunk to the chunks before it, in each layer as it was computed then.

    ``last`` is set for the chunk behind which there is no other: of it nothing is kept. Speech
    that is made in one piece is one such chunk. Attention reaches all frames before, or with
    ``reach`` = (first, recent) the first and the most recent ones.
    """

    def __init__(self, reach: tuple[int, int] | None = None, last: bool = False):
        self.last, self._reach = last, reach
        self._kept: dict[nn.Module, Kept] = {}

    def before(self, layer: nn.Module, x: Tensor, frames: int) -> Tensor:
        """x [batch, channels, time] behind the ``frames`` before it; before all, they are zero."""
        (known,) = self._kept.pop(layer, (x.new_zeros(*x.shape[:2], frames),))
        joined = torch.cat([known, x], dim=2)
        if not self.last:
            self._kept[layer] = (joined[..., -frames:].clone(),)
        return joined

    def attended(self, layer: nn.Module, keys: Tensor, values: Tensor) -> Kept:
        """Keys and values [batch, heads, time, dim] behind those of the frames before."""
        known = self._kept.pop(layer, None)
        if known is not None:
            joined = zip(known, (keys, values), strict=True)
            keys, values = (torch.cat(pair, dim=2) for pair in joined)
        if not self.last:
            self._kept[layer] = self._reached(keys), self._reached(values)
        return keys, values

    def _reached(self, x: Tensor) -> Tensor:
        if self._reach is None or x.shape[2] <= sum(self._reach):
            return x
        first, recent = self._reach
        return torch.cat([x[:, :, :first], x[:, :, -recent:]], dim=2)
