"""Sounds heard through one of their two streams alone, so that a model learns to use both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class StreamDropout:
    """Takes Whisper features or speech codes from whole sounds, never both from one.

    Args:
        features: part of the sounds whose features are zeroed.
        codes: part of the sounds whose codes are replaced.
        blank: id that replaces them.
    """

    features: float
    codes: float
    blank: int

    def __call__(
        self, audio_ids: Tensor, is_continuous: Tensor, features: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Audio ids and features with what is left; drawn from the default generator.

        audio_ids int64 and is_continuous bool [batch, length]; features [positions, dim], one row
        for each continuous position. A sound is a run of continuous positions.
        """
        before = F.pad(is_continuous[:, :-1], (1, 0))
        sounds = (is_continuous & ~before).flatten().cumsum(0)[is_continuous.flatten()] - 1
        draws = torch.rand(int(sounds[-1]) + 1).to(sounds.device)[sounds]
        unheard = draws < self.features
        uncoded = is_continuous.clone()
        uncoded[is_continuous] = draws >= 1.0 - self.codes
        return audio_ids.masked_fill(uncoded, self.blank), features * ~unheard[:, None]
