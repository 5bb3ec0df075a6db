"""The two slow parts of the published Step-Audio-EditX, rebuilt: the loop of VQ02, and ALiBi."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kimia_infer.models.step_audio_editx.language_model import (
    KeyValueCache,
    LanguageModel,
    distance_bias,
    slopes,
)
from kimia_infer.models.step_audio_editx.vq02 import SanmEncoder, positions


def step_with_all_pairs(
    model: LanguageModel, token: Tensor, position: int, cache: KeyValueCache
) -> Tensor:
    """What ``LanguageModel.step`` gives, with the bias of all pairs of positions in every layer."""
    x = model.model.embed_tokens(token)[None]
    head_slopes = torch.tensor(slopes(model.config.heads), device=x.device)
    unrotated = x.new_ones(1, 1, 1), x.new_zeros(1, 1, 1)
    every = torch.arange(position + 1, device=x.device)
    cache.place, cache.length = every[-1:], position + 1
    for layer in model.model.layers:
        bias = distance_bias(every, position + 1, head_slopes, x.dtype)[:, -1:]
        x = layer(x, attention_mask=bias, past_key_values=cache, position_embeddings=unrotated)
    return model.lm_head(model.model.norm(x)[0, -1])


def encode_by_chunks(encoder: SanmEncoder, rows: Tensor) -> Tensor:
    """[rows, width] of normalized features [rows, FEATURES], four rows at a time."""
    scaled = rows * math.sqrt(encoder.config.width) + positions(len(rows), rows.device)
    carried = rows.new_zeros(5, rows.shape[1])
    blocks: list[Any] = [*encoder.encoders0, *encoder.encoders]
    past: list[tuple[Tensor, Tensor] | None] = [None] * len(blocks)
    found = []
    for chunk in scaled.split(4):
        x = torch.cat([carried, chunk])
        carried = x[-5:]
        for layer, block in enumerate(blocks):
            attention = block.self_attn
            query, keys, values = attention.linear_q_k_v(block.norm1(x)).chunk(3, dim=-1)
            memory = attention.fsmn_block(values.T[None])[0].T + values
            new = keys[:4], values[:4]
            if (state := past[layer]) is not None:
                keys, values = torch.cat([state[0], keys]), torch.cat([state[1], values])
                new = torch.cat([state[0], new[0]])[-16:], torch.cat([state[1], new[1]])[-16:]
            past[layer] = new
            width = query.shape[1] // attention.heads
            heads = [
                F.softmax(q @ k.T / math.sqrt(width), dim=-1) @ v
                for q, k, v in zip(*(t.split(width, 1) for t in (query, keys, values)), strict=True)
            ]
            attended = attention.linear_out(torch.cat(heads, dim=1)) + memory
            x = attended if x.shape != attended.shape else x + attended
            x = x + block.feed_forward(block.norm2(x))
        found.append(encoder.after_norm(x)[5:])
    return torch.cat(found)
