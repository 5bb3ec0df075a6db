"""VQ06: 25 codes a second, the nearest codebook entry to frames of a Whisper-like encoder.

The package s3tokenizer has the same network; it needs torchaudio, which has no release for the
PyTorch used here, and cuts recordings of more than 30 s otherwise than the published code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimia_infer.models.step_audio_editx.frontend import RATE, WHISPER_MEL, whisper_mel

BLOCK_SAMPLES = 30 * RATE
SHORTEST_BLOCK = 480
"""Samples; shorter blocks give no code."""


@dataclass(frozen=True)
class EncoderSizes:
    """Of the encoder and its codebook; the defaults are the published ones."""

    width: int = 1280
    heads: int = 20
    layers: int = 6
    codes: int = 4096
    positions: int = 1500


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.value, self.out = (nn.Linear(width, width) for _ in range(3))
        self.key = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, time, width] -> the same shape."""
        query, keys, values = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, keys, values)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn, self.attn_ln = Attention(width, heads), nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.mlp_ln = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.attn_ln(x))
        return x + self.mlp(self.mlp_ln(x))


class Encoder(nn.Module):
    def __init__(self, sizes: EncoderSizes):
        super().__init__()
        width = sizes.width
        self.conv1 = nn.Conv1d(WHISPER_MEL.mel_bins, width, 3, stride=2, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.positional_embedding = nn.Parameter(torch.empty(sizes.positions, width))
        self.blocks = nn.ModuleList(Block(width, sizes.heads) for _ in range(sizes.layers))

    def forward(self, mel: Tensor) -> Tensor:
        """mel [batch, bins, frames] -> [batch, about frames / 4, width]."""
        x = F.gelu(self.conv2(F.gelu(self.conv1(mel)))).mT
        x = x + self.positional_embedding[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return x


class Codebook(nn.Module):
    def __init__(self, sizes: EncoderSizes):
        super().__init__()
        self.embed = nn.Parameter(torch.empty(sizes.codes, sizes.width))

    def forward(self, hidden: Tensor) -> Tensor:
        """int64 [time] of hidden [time, width]: the entries nearest to the normalized rows."""
        unit = F.normalize(hidden, dim=-1)
        return (self.embed.square().sum(1) - 2 * unit @ self.embed.T).argmin(1)


class Quantizer(nn.Module):
    def __init__(self, sizes: EncoderSizes):
        super().__init__()
        self._codebook = Codebook(sizes)

    def forward(self, hidden: Tensor) -> Tensor:
        return self._codebook(hidden)


class Vq06(nn.Module):
    """Waves to codes. Parameters are named as in s3tokenizer; everything is float32."""

    def __init__(self, sizes: EncoderSizes):
        super().__init__()
        self.encoder = Encoder(sizes)
        self.quantizer = Quantizer(sizes)

    def forward(self, wave: Tensor) -> list[int]:
        """The codes of a wave [samples] at 16 kHz, block after block of 30 s."""
        codes = []
        for block in wave.split(BLOCK_SAMPLES):
            if len(block) >= SHORTEST_BLOCK:
                codes += self.quantizer(self.encoder(whisper_mel(block)[None])[0]).tolist()
        return codes
