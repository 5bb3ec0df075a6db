"""Attention over whole samples at once, with gradients and without a cache."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kimia_infer.language_model.attention import Attend, rotate, split_heads
from kimia_infer.language_model.cache import rotary_tables
from kimia_infer.language_model.config import LanguageModelConfig


def causal_attention(config: LanguageModelConfig) -> Attend:
    """Causal attention of sequences that begin at position 0, for one forward pass.

    The projections are [batch, length, rows]. Samples that are padded at their end need no
    mask: only padding sees padding.
    """
    tables: dict[tuple, tuple[Tensor, Tensor]] = {}

    def attend(qkv: Tensor, layer: int) -> Tensor:
        kind = (qkv.shape[1], qkv.device, qkv.dtype)
        if kind not in tables:
            tables[kind] = rotary_tables(config, *kind)
        cos, sin = tables[kind]
        query, keys, values = split_heads(qkv, config.kv_heads, config.head_dim)
        mixed = F.scaled_dot_product_attention(
            rotate(query, cos, sin), rotate(keys, cos, sin), values, is_causal=True, enable_gqa=True
        )
        return mixed.transpose(1, 2).flatten(2)

    return attend
