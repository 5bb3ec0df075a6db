"""Phonemes to vectors: ALBERT for prosody, convolutions and an LSTM for pronunciation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertModel

from kimia_infer.models.kokoro.config import AlbertSizes, KokoroConfig
from kimia_infer.models.kokoro.layers import EPSILON, BiLSTM, Conv, Rows


class Albert(AlbertModel):
    """The published ALBERT without its pooler, which nothing reads."""

    def __init__(self, sizes: AlbertSizes, symbols: int):
        config = AlbertConfig(
            vocab_size=symbols,
            hidden_dropout_prob=0.0,
            **sizes.model_dump(),
        )
        super().__init__(config, add_pooling_layer=False)
        for name in ("position_ids", "token_type_ids"):  # given with every call instead
            delattr(self.embeddings, name)

    def encode(self, ids: Tensor, rows: Rows) -> Tensor:
        """ids int64 [batch, time] -> [batch, time, hidden]."""
        mask = rows.mask(ids.shape[1])
        places = torch.arange(ids.shape[1], device=ids.device)[None]
        return self(
            input_ids=ids,
            attention_mask=None if mask is None else mask[..., 0].long(),
            token_type_ids=torch.zeros_like(ids),
            position_ids=places,
        ).last_hidden_state


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
