"""Rows of codes to a mel spectrogram in the voice of a prompt, by flow matching.

The package stepaudio2-minicpmo has these networks; importing it takes torchaudio, which has no
release for the PyTorch used here, diffusers, s3tokenizer and onnxruntime.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimia_infer.models.step_audio_editx.config import FlowConfig
from kimia_infer.models.step_audio_editx.conformer import Encoder
from kimia_infer.models.step_audio_editx.dit import DiT
from kimia_infer.models.step_audio_editx.packing import TABLE_ROWS

STEPS = 10
"""Of the integration, published call."""


class DualEmbedding(nn.Module):
    """Two codes of a row in one table, side by side."""

    def __init__(self, width: int):
        super().__init__()
        self.embedding = nn.Embedding(TABLE_ROWS, width // 2)

    def forward(self, rows: Tensor) -> Tensor:
        """rows int64 [..., 2] -> [..., width]."""
        return self.embedding(rows).flatten(-2)


class Decoder(nn.Module):
    def __init__(self, config: FlowConfig):
        super().__init__()
        self.estimator = DiT(config.decoder.estimator)


class Flow(nn.Module):
    """Parameters are named as in the published checkpoint."""

    def __init__(self, config: FlowConfig):
        super().__init__()
        self.config = config
        self.input_embedding = DualEmbedding(config.width)
        self.spk_embed_affine_layer = nn.Linear(config.speaker, config.mel_bins)
        self.encoder = Encoder(config.encoder)
        self.encoder_proj = nn.Linear(config.encoder.width, config.mel_bins)
        self.decoder = Decoder(config)

    def forward(
        self, rows: Tensor, prompt_rows: Tensor, prompt_mel: Tensor, speaker: Tensor, noise: Tensor
    ) -> Tensor:
        """Mel float32 [2 * rows, bins].

        Args:
            rows: int64 [rows, 2] to be spoken.
            prompt_rows: those of the prompt, int64 [prompt rows, 2].
            prompt_mel: its spectrogram, [2 * prompt rows, bins].
            speaker: the vector of the voice, [speaker].
            noise: standard normal [2 * (prompt rows + rows), bins].
        """
        embedded = self.input_embedding(torch.cat([prompt_rows, rows]))
        wanted = self.encoder_proj(self.encoder(embedded[None])[0])
        known = F.pad(prompt_mel, (0, 0, 0, len(wanted) - len(prompt_mel)))
        voice = self.spk_embed_affine_layer(F.normalize(speaker, dim=0)).expand_as(wanted)
        conditions = torch.cat([wanted, voice, known], dim=-1)
        return self._integrate(noise, conditions)[len(prompt_mel) :]

    def _integrate(self, x: Tensor, conditions: Tensor) -> Tensor:
        """Euler steps from noise x [frames, bins], more of them near the begin."""
        times = 1 - torch.cos(torch.linspace(0, 1, STEPS + 1, device=x.device) * (math.pi / 2))
        time = times[0]
        for following in times[1:]:
            step = following - time
            x = x + step * self.velocity(x, conditions, time)
            time = time + step
        return x

    def velocity(self, x: Tensor, conditions: Tensor, time: Tensor) -> Tensor:
        """With conditions [frames, 3 * bins], guided away from the velocity without them."""
        given = torch.cat([x, conditions], dim=-1)
        none = torch.cat([x, torch.zeros_like(conditions)], dim=-1)
        both = self.decoder.estimator(torch.stack([given, none]), time.expand(2))
        rate = self.config.decoder.guidance
        return (1 + rate) * both[0] - rate * both[1]
