"""The dual-track model: trunk, MIMO branch forked inside it, and two heads.

Two token tracks of equal length, audio and text, are embedded with one table and summed per
position. The trunk's head predicts the text track; a branch that forks after
``fork_layer`` predicts the audio track. Query/key/value and gate/up matrices are joined, so
that a single-token step reads each in one product.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimia_infer.language_model.attention import causal_attention
from kimia_infer.language_model.cache import KeyValueCache
from kimia_infer.language_model.config import LanguageModelConfig
from kimia_infer.weights.checkpoint import Part, Slot, open_directory


class RMSNorm(nn.Module):
    """x / rms(x) * weight, accumulated in fp32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions over the cache."""

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        rows = (config.heads + 2 * config.kv_heads) * config.head_dim
        self.qkv = nn.Linear(config.hidden_size, rows)
        self.output = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cache: KeyValueCache, layer: int, start: int) -> Tensor:
        batch, length, _ = x.shape
        heads = self.qkv(x).view(batch, length, -1, self.head_dim).transpose(1, 2)
        query, keys, values = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        cos, sin = cache.cos[start : start + length], cache.sin[start : start + length]
        keys, values = cache.append(layer, start, rotate(keys, cos, sin), values)
        mixed = causal_attention(rotate(query, cos, sin), keys, values)
        return self.output(mixed.transpose(1, 2).reshape(batch, length, -1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [..., length, head_dim]; the two halves of head_dim form pairs."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class DecoderLayer(nn.Module):
    """A Qwen2 block: pre-norm attention and feed-forward, each with a residual."""

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, cache: KeyValueCache, layer: int, start: int) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cache, layer, start)
        return x + self.feed_forward(self.feed_forward_norm(x))


class VQAdaptor(nn.Module):
    """Whisper features [n, adaptor_input_dim] -> embeddings [n, hidden_size]."""

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        self.input = nn.Linear(config.adaptor_input_dim, config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, features: Tensor) -> Tensor:
        return self.norm(self.output(F.silu(self.input(features))))


class Hidden(NamedTuple):
    """Normalized states [batch, length, hidden_size] that the heads read; None if not asked for."""

    text: Tensor | None
    audio: Tensor | None


class LanguageModel(nn.Module):
    """Embedding, trunk, MIMO branch and both heads."""

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.adaptor = VQAdaptor(config)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.trunk_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.text_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mimo_layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.mimo_layers))
        self.mimo_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.audio_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    def new_cache(self, capacity: int, batch: int = 1) -> KeyValueCache:
        return KeyValueCache(self.config, capacity, self.device, self.dtype, batch)

    def embed(
        self,
        audio_ids: Tensor,
        text_ids: Tensor,
        is_continuous: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """Sum of both tracks' embeddings [batch, length, hidden_size].

        audio_ids, text_ids int64 [batch, length]; at the positions where ``is_continuous``
        (bool, same shape) holds, the adapted ``features`` [positions, adaptor_input_dim] are
        added to the audio embedding and the sum is scaled by sqrt(2).

        As published, a row whose text ids are all 0 gets no text embedding at all; during
        decoding that affects every step whose text id is 0 (``!`` in the published
        vocabulary), so tokens depend on it.
        """
        audio = self.embedding(audio_ids)
        if features is not None:
            adapted = self.adaptor(features.to(self.device, self.dtype))
            # Rounded to the working dtype first, as the published code does.
            scale = torch.tensor(math.sqrt(2.0), dtype=self.dtype, device=self.device)
            audio[is_continuous] = (audio[is_continuous] + adapted) * scale
        has_text = (text_ids != 0).any(dim=1)[:, None, None]
        return torch.where(has_text, audio + self.embedding(text_ids), audio)

    def forward(
        self, x: Tensor, cache: KeyValueCache, start: int, text: bool = True, audio: bool = True
    ) -> Hidden:
        """Run embeddings x [batch, length, hidden_size] that stand at ``start`` of the cache.

        Only what the wanted tracks need is computed: without ``text`` the trunk ends at the
        fork, without ``audio`` the MIMO branch is not entered.
        """
        config = self.config
        last = config.trunk_layers if text else config.fork_layer + 1
        fork = x
        for index in range(last):
            x = self.layers[index](x, cache, index, start)
            if index == config.fork_layer:
                fork = x
        if audio:
            for index, layer in enumerate(self.mimo_layers):
                fork = layer(fork, cache, config.trunk_layers + index, start)
        return Hidden(self.norm(x) if text else None, self.mimo_norm(fork) if audio else None)


def _layer_slots(stored: str, ours: str, config: LanguageModelConfig) -> list[Slot]:
    hidden, inner = config.hidden_size, config.intermediate_size
    key_rows = config.kv_heads * config.head_dim
    slots = []
    row = 0
    for name, rows in (("q", hidden), ("k", key_rows), ("v", key_rows)):
        span, source = (row, row + rows), f"{stored}.self_attn.{name}_proj"
        target = f"{ours}.attention.qkv"
        slots.append(Slot(f"{target}.weight", {f"{source}.weight": (rows, hidden)}, span))
        slots.append(Slot(f"{target}.bias", {f"{source}.bias": (rows,)}, span))
        row += rows
    for index, name in enumerate(("gate", "up")):
        span = (index * inner, (index + 1) * inner)
        source = {f"{stored}.mlp.{name}_proj.weight": (inner, hidden)}
        slots.append(Slot(f"{ours}.feed_forward.gate_up.weight", source, span))
    single = {
        "attention.output": ("self_attn.o_proj", (hidden, hidden)),
        "feed_forward.down": ("mlp.down_proj", (hidden, inner)),
        "attention_norm": ("input_layernorm", (hidden,)),
        "feed_forward_norm": ("post_attention_layernorm", (hidden,)),
    }
    for target, (source, shape) in single.items():
        slots.append(Slot(f"{ours}.{target}.weight", {f"{stored}.{source}.weight": shape}))
    return slots


def language_model_slots(config: LanguageModelConfig) -> list[Slot]:
    """Every learned tensor of the published checkpoint (419 at full size) and its place."""
    hidden, vocabulary = config.hidden_size, (config.vocab_size, config.hidden_size)
    single = {
        "embedding.weight": ("model.embed_tokens.weight", vocabulary),
        "norm.weight": ("model.norm.weight", (hidden,)),
        "mimo_norm.weight": ("model.mimo_norm.weight", (hidden,)),
        "text_head.weight": ("lm_head.weight", vocabulary),
        "audio_head.weight": ("mimo_output.weight", vocabulary),
        "adaptor.input.weight": (
            "model.vq_adaptor.layers.0.weight",
            (hidden, config.adaptor_input_dim),
        ),
        "adaptor.input.bias": ("model.vq_adaptor.layers.0.bias", (hidden,)),
        "adaptor.output.weight": ("model.vq_adaptor.layers.3.weight", (hidden, hidden)),
        "adaptor.output.bias": ("model.vq_adaptor.layers.3.bias", (hidden,)),
        "adaptor.norm.weight": ("model.vq_adaptor.layers.4.weight", (hidden,)),
        "adaptor.norm.bias": ("model.vq_adaptor.layers.4.bias", (hidden,)),
    }
    slots = [Slot(target, {source: shape}) for target, (source, shape) in single.items()]
    for index in range(config.trunk_layers):
        slots += _layer_slots(f"model.layers.{index}", f"layers.{index}", config)
    for index in range(config.mimo_layers):
        slots += _layer_slots(f"model.mimo_layers.{index}", f"mimo_layers.{index}", config)
    return slots


def ignored_tensors(config: LanguageModelConfig) -> dict[str, tuple[int, ...]]:
    """Stored rotary frequencies (34 at full size): present in the checkpoint, never used."""
    prefixes = [f"model.layers.{i}" for i in range(config.trunk_layers)]
    prefixes += [f"model.mimo_layers.{i}" for i in range(config.mimo_layers)]
    return {f"{p}.self_attn.rotary_emb.inv_freq": (config.head_dim // 2,) for p in prefixes}


def language_model_part(directory: Path) -> Part:
    """The language model of a checkpoint directory.

    Fine-tuned checkpoints also hold the Whisper encoder under ``whisper_model.``; serving
    reads it from its own folder.
    """
    config = LanguageModelConfig.from_directory(directory)
    return Part(
        name="language model",
        build=lambda: LanguageModel(config),
        slots=language_model_slots(config),
        store=open_directory(directory),
        ignored=(*ignored_tensors(config), "whisper_model.*"),
    )
