"""Phonemes to vectors for prosody. Apart, since importing transformers takes seconds."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AlbertConfig, AlbertModel

from kimia_infer.models.kokoro.config import AlbertSizes
from kimia_infer.models.kokoro.layers import Rows


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
