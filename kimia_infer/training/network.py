"""What is trained: the language model and the Whisper encoder that feeds it, as one module."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from kimia_infer.models.kimi_audio.language_model import LanguageModel
from kimia_infer.models.kimi_audio.whisper import FRAMES_PER_CODE
from kimia_infer.training.attention import causal_attention
from kimia_infer.training.batch import Batch
from kimia_infer.training.loss import TrackLosses, track_loss
from kimia_infer.training.stream_dropout import StreamDropout

PARTS = {
    "embedding": ("language_model.embedding.",),
    "trunk": ("language_model.layers.", "language_model.norm."),
    "mimo": ("language_model.mimo_layers.", "language_model.mimo_norm."),
    "adaptor": ("language_model.adaptor.",),
    "heads": ("language_model.text_head.", "language_model.audio_head."),
    "whisper": ("whisper.",),
}
"""The parts that can be trained, by the prefixes of their parameters."""


class TrainingNetwork(nn.Module):
    """Batches to losses, with gradients.

    Args:
        language_model: as served, with both full heads.
        whisper: the encoder, as served.
        dtype: of activations; float32, or bfloat16 under autocast.

    ``stream_dropout``, if there is one, takes a stream from some sounds while training.
    """

    def __init__(
        self, language_model: LanguageModel, whisper: WhisperEncoder, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.language_model = language_model
        self.whisper = whisper
        self.dtype = dtype
        self.stream_dropout: StreamDropout | None = None

    def forward(self, batch: Batch) -> TrackLosses:
        """The losses of every sample.

        Both branches always run, and the adaptor too, so that every process of a sharded run
        takes part in every exchange and parameters without influence get zero gradients.
        """
        with self._autocast(batch.audio_ids.device):
            x = self._embed(batch)
            model = self.language_model
            hidden = model(x, causal_attention(model.config))
            return TrackLosses(
                track_loss(
                    hidden.audio, model.audio_head, batch.audio_labels, batch.audio_loss_mask
                ),
                track_loss(hidden.text, model.text_head, batch.text_labels, batch.text_loss_mask),
            )

    def _autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, self.dtype == torch.bfloat16)

    def _embed(self, batch: Batch) -> Tensor:
        """Sum of both tracks' embeddings [batch, length, hidden_size].

        As :meth:`LanguageModel.embed` does it, for parameters that may differ in dtype. The
        text track of a sample is never all 0, which alone is treated differently there.
        """
        model, audio_ids, features = self.language_model, batch.audio_ids, self._features(batch)
        heard = batch.mel is not None or batch.features is not None
        if self.training and self.stream_dropout is not None and heard:
            audio_ids, features = self.stream_dropout(audio_ids, batch.is_continuous, features)
        audio, text = model.embedding(torch.stack([audio_ids, batch.text_ids])).to(self.dtype)
        adapted = model.adaptor(features).to(self.dtype)
        if not heard:
            return audio + text + 0 * adapted.sum()
        scale = torch.tensor(math.sqrt(2.0), dtype=self.dtype, device=audio.device)
        continuous = batch.is_continuous
        joined = (audio[continuous] + adapted) * scale
        return audio.index_put((continuous,), joined) + text

    def _features(self, batch: Batch) -> Tensor:
        """Whisper features [positions, adaptor_input_dim] of all sounds; one of zeros without."""
        if batch.features is not None:
            return batch.features
        config, mel, counts = self.language_model.config, batch.mel, batch.segment_codes
        trained = any(parameter.requires_grad for parameter in self.whisper.parameters())
        if mel is None:
            if not trained:
                return torch.zeros(1, config.adaptor_input_dim, device=batch.audio_ids.device)
            encoder = self.whisper.config
            shape = (1, encoder.num_mel_bins, 2 * encoder.max_source_positions)
            mel, counts = torch.zeros(shape, device=batch.audio_ids.device), [1]
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            return self.whisper_features(mel, counts)

    def whisper_features(self, mel: Tensor, counts: Sequence[int]) -> Tensor:
        """Features fp32 [positions, adaptor_input_dim] of spectrograms [segments, mels, frames].

        ``counts`` says how many each segment gives.
        """
        with self._autocast(mel.device):
            frames = self.whisper(mel.to(self.dtype)).last_hidden_state
        kept = [rows[: FRAMES_PER_CODE * count] for rows, count in zip(frames, counts, strict=True)]
        return torch.cat(kept).reshape(-1, self.language_model.config.adaptor_input_dim).float()

    def blocks(self) -> Iterator[nn.Module]:
        """The layers, in the order in which they run."""
        yield from self.whisper.layers
        yield from self.language_model.layers
        yield from self.language_model.mimo_layers


def recompute_activations(network: TrainingNetwork) -> None:
    """Keep only the inputs of each layer; the backward pass computes the rest again.

    Also called gradient checkpointing.
    """
    for block in network.blocks():
        block.forward = partial(_recomputed, block.forward)


def _recomputed(forward, *arguments, **options):
    if not torch.is_grad_enabled():
        return forward(*arguments, **options)
    return checkpoint(forward, *arguments, use_reentrant=False, **options)
