"""Attention over whole samples at once, with gradients and without a cache."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kimia_infer.layers.attention import Attend, rotate, split_heads
from kimia_infer.layers.cache import rotary_tables
from kimia_infer.models.kimi_audio.config import LanguageModelConfig


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
        mix = _mix_on_cpu if query.is_cpu else _mix
        mixed = mix(rotate(query, cos, sin), rotate(keys, cos, sin), values)
        return mixed.transpose(1, 2).flatten(2)

    return attend


def _mix(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention [batch, heads, length, head_dim]; heads share keys in groups."""
    return F.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)


def _mix_on_cpu(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The same in plain products, as the fused kernel's backward pass takes longer there.

    With samples of 80 positions a whole training step took 1.6 times as long with it.
    """
    batch, heads, length, _ = query.shape
    keys, values = (
        x.repeat_interleave(heads // x.shape[1], 1).flatten(0, 1) for x in (keys, values)
    )
    hidden = query.new_full((1, length, length), -torch.inf).triu(1)
    scale = 1 / math.sqrt(query.shape[-1])
    scores = torch.baddbmm(hidden, query.flatten(0, 1), keys.mT, alpha=scale)
    return torch.bmm(scores.softmax(-1), values).unflatten(0, (batch, heads))
