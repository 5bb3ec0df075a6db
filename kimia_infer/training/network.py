"""What is trained: the language model and the Whisper encoder that feeds it, as one module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from kimia_infer.models.kimi_audio.config import FRAMES_PER_CODE
from kimia_infer.models.kimi_audio.encoders import whisper_frames
from kimia_infer.models.kimi_audio.language_model import LanguageModel, causal_attention
from kimia_infer.training.dataset import Batch

Losses = dict[str, Tensor]
"""Losses of every sample, float32 [batch] each, by name; their sum is what is trained."""

SMOOTHING = 1e-4
"""Added to the number of positions that count (published fine-tuning code)."""

CHUNK_POSITIONS = 256
"""Positions whose logits exist at a time: 0.17 GB in float32 at the published vocabulary."""

TRAINABLE = {
    "embedding": ("language_model.embedding.",),
    "trunk": ("language_model.layers.", "language_model.norm."),
    "mimo": ("language_model.mimo_layers.", "language_model.mimo_norm."),
    "adaptor": ("language_model.adaptor.",),
    "heads": ("language_model.text_head.", "language_model.audio_head."),
    "whisper": ("whisper.",),
}
"""Prefixes of the parameters of everything that can be trained."""


class TrainingNetwork(nn.Module):
    """Batches to losses, with gradients, through the modules that are served.

    Activations have ``dtype``: float32, or bfloat16 under autocast. ``stream_dropout``, if there
    is one, removes one stream of some recordings while training.
    """

    def __init__(
        self, language_model: LanguageModel, whisper: WhisperEncoder, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.language_model = language_model
        self.whisper = whisper
        self.dtype = dtype
        self.stream_dropout: StreamDropout | None = None

    def forward(self, batch: Batch) -> Losses:
        """The losses of both tracks.

        Both branches always run, and the adaptor too, so that every process of a sharded run
        takes part in every exchange and parameters without influence get zero gradients.
        """
        with self._autocast(batch.audio_ids.device):
            x = self._embed(batch)
            model = self.language_model
            hidden = model(x, causal_attention(model.config))
            audio = batch.audio_labels, batch.audio_loss_mask
            text = batch.text_labels, batch.text_loss_mask
            return {
                "audio": track_loss(hidden.audio, model.audio_head, *audio),
                "text": track_loss(hidden.text, model.text_head, *text),
            }

    def _autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, self.dtype == torch.bfloat16)

    def _embed(self, batch: Batch) -> Tensor:
        """Sum of both tracks' embeddings [batch, length, hidden_size]."""
        audio_ids, features = batch.audio_ids, self._features(batch)
        if self.training and self.stream_dropout is not None and len(features):
            audio_ids, features = self.stream_dropout(audio_ids, batch.is_continuous, features)
        return self.language_model.embed(
            audio_ids, batch.text_ids, batch.is_continuous, features, self.dtype
        )

    def _features(self, batch: Batch) -> Tensor:
        """Whisper features [positions, adaptor_input_dim] of all audio in the batch.

        An encoder that is trained, or divided among processes, runs on silence where there is no
        audio; nothing of that is used.
        """
        if batch.features is not None:
            return batch.features
        config, device = self.language_model.config, batch.audio_ids.device
        mel, counts = batch.mel, batch.segment_codes
        trained = any(parameter.requires_grad for parameter in self.whisper.parameters())
        if not mel:
            if not trained and not isinstance(self, FSDPModule):
                return torch.zeros(0, config.adaptor_input_dim, device=device)
            encoder = self.whisper.config
            shape = (encoder.num_mel_bins, 2 * encoder.max_source_positions)
            mel, counts = [torch.zeros(shape, device=device)], [0]
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            return self.whisper_features(mel, counts)

    def whisper_features(self, mel: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
        """Features fp32 [positions, adaptor_input_dim] of spectrograms [mels, frames] in order.

        ``counts`` says how many each gives. Those of one length are encoded together.
        """
        groups: dict[int, list[int]] = {}
        for place, row in enumerate(mel):
            groups.setdefault(row.shape[1], []).append(place)
        kept = [torch.empty(0)] * len(mel)
        for places in groups.values():
            together = torch.stack([mel[place] for place in places])
            with self._autocast(together.device):
                frames = whisper_frames(self.whisper, together.to(self.dtype))
            for place, rows in zip(places, frames, strict=True):
                kept[place] = rows[: FRAMES_PER_CODE * counts[place]]
        return torch.cat(kept).reshape(-1, self.language_model.config.adaptor_input_dim).float()

    def blocks(self) -> Iterator[nn.Module]:
        """The layers, in the order in which they run."""
        yield from self.whisper.layers
        yield from self.language_model.layers
        yield from self.language_model.mimo_layers


def recompute_activations(network: Any) -> None:
    """Keep only the inputs of each layer; the backward pass computes the rest again."""
    for block in network.blocks():
        block.forward = partial(_recomputed, block.forward)


def _recomputed(forward: Callable, *arguments: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments, **options)
    return checkpoint(forward, *arguments, use_reentrant=False, **options)


@dataclass(frozen=True)
class StreamDropout:
    """Removes Whisper features or speech codes of whole recordings, never both of one.

    So a model learns to use each stream alone. ``features`` is the share of recordings whose
    features are zeroed, ``codes`` that of those whose codes are replaced by the id ``blank``.
    """

    features: float
    codes: float
    blank: int

    def __call__(
        self, audio_ids: Tensor, is_continuous: Tensor, features: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Audio ids and features that remain; drawn from the default generator.

        audio_ids int64 and is_continuous bool [batch, length]; features [positions, dim], one row
        for each continuous position. A recording is a run of continuous positions.
        """
        before = F.pad(is_continuous[:, :-1], (1, 0))
        sounds = (is_continuous & ~before).flatten().cumsum(0)[is_continuous.flatten()] - 1
        draws = torch.rand(int(sounds[-1]) + 1).to(sounds.device)[sounds]
        unheard = draws < self.features
        uncoded = is_continuous.clone()
        uncoded[is_continuous] = draws >= 1.0 - self.codes
        return audio_ids.masked_fill(uncoded, self.blank), features * ~unheard[:, None]


def track_loss(
    hidden: Tensor, head: nn.Module, labels: Tensor, mask: Tensor, chunk: int = CHUNK_POSITIONS
) -> Tensor:
    """Mean cross entropy of one track, float32 [batch]: sum(ce * mask) / (sum(mask) + 1e-4).

    hidden [batch, length, hidden_size]; labels int64 and mask bool [batch, length]. Logits are
    computed only where the mask holds, ``chunk`` positions at a time, and again in backward. A
    sample without such a position has the loss 0, and zero gradients.
    """
    states, targets = hidden[mask], labels[mask]
    entropies = [
        checkpoint(_cross_entropy, rows, head, target, use_reentrant=False)
        for rows, target in zip(states.split(chunk), targets.split(chunk), strict=True)
    ]
    rows = mask.nonzero()[:, 0]
    sums = torch.zeros(len(mask), device=hidden.device).index_add(0, rows, torch.cat(entropies))
    return sums / (mask.sum(dim=1) + SMOOTHING)


def _cross_entropy(states: Tensor, head: nn.Module, labels: Tensor) -> Tensor:
    return F.cross_entropy(head(states).float(), labels, reduction="none")
