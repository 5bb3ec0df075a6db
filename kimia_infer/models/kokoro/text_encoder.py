"""Phonemes to vectors for pronunciation: convolutions and an LSTM."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimia_infer.models.kokoro.config import KokoroConfig
from kimia_infer.models.kokoro.layers import EPSILON, BiLSTM, Conv, Rows


class ChannelNorm(nn.Module):
    """Layer norm with the published names of its parameters."""

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(channels))
        self.beta = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.gamma, self.beta, EPSILON)


class TextEncoder(nn.Module):
    """Convolution blocks and an LSTM over embedded phonemes."""

    def __init__(self, channels: int, kernel: int, depth: int, symbols: int):
        super().__init__()
        self.embedding = nn.Embedding(symbols, channels)
        self.cnn = nn.ModuleList(
            nn.ModuleList(
                [Conv(channels, channels, kernel, padding=kernel // 2), ChannelNorm(channels)]
            )
            for _ in range(depth)
        )
        self.lstm = BiLSTM(channels, channels)

    @classmethod
    def of(cls, config: KokoroConfig) -> TextEncoder:
        kernel = config.text_encoder_kernel_size
        return cls(config.hidden_dim, kernel, config.n_layer, config.n_token)

    def forward(self, ids: Tensor, rows: Rows) -> Tensor:
        """ids int64 [batch, time] -> [batch, time, channels], zeros behind each end."""
        x = rows.clear(self.embedding(ids))
        for convolution, norm in self.cnn:  # pyrefly: ignore[not-iterable]
            x = rows.clear(F.leaky_relu(norm(convolution(x)), 0.2))
        return self.lstm(x, rows)
