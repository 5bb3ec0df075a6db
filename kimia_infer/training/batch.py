"""Samples of different lengths side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kimia_infer.training.samples import Sample


@dataclass(frozen=True)
class Batch:
    """Samples padded at their end; ids, labels and masks are [batch, length].

    ``weights`` [batch] is what the loss of each sample counts. ``mel`` [segments, mels, frames]
    and ``segment_codes`` join the segments of all samples in order, None and empty without.
    ``features`` [positions, dim] likewise join stored Whisper features, and there is no mel then.
    ``names`` says for reports where the samples come from.
    """

    audio_ids: Tensor
    text_ids: Tensor
    is_continuous: Tensor
    audio_labels: Tensor
    text_labels: Tensor
    audio_loss_mask: Tensor
    text_loss_mask: Tensor
    weights: Tensor
    mel: Tensor | None
    segment_codes: list[int]
    names: list[str]
    features: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)

    def pin_memory(self) -> Batch:
        """For the data loader: a copy in page-locked memory."""
        pinned = {
            field.name: value.pin_memory()
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **pinned)


def join(
    samples: Sequence[Sample], pad: int, weights: Sequence[float], names: Sequence[str] = ()
) -> Batch:
    """Pad ``samples`` to the longest of them with ``pad`` and masks that are False.

    Padding follows a sample, and attention is causal, so no position of a sample sees it.
    """

    def column(name: str, filler: int | bool) -> Tensor:
        values = [getattr(sample, name) for sample in samples]
        return pad_sequence(values, batch_first=True, padding_value=filler)

    ids = ("audio_ids", "text_ids", "audio_labels", "text_labels")
    masks = ("is_continuous", "audio_loss_mask", "text_loss_mask")
    mels = [sample.mel for sample in samples if sample.mel is not None]
    stored = [sample.features for sample in samples if sample.features is not None]
    return Batch(
        **{name: column(name, pad) for name in ids},
        **{name: column(name, False) for name in masks},
        weights=torch.tensor(weights, dtype=torch.float32),
        mel=torch.cat(mels) if mels else None,
        segment_codes=[count for sample in samples for count in sample.segment_codes],
        names=list(names),
        features=torch.cat(stored) if stored else None,
    )
