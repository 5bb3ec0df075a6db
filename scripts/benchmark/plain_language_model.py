"""The published token loop: the baseline of the speed comparison.

It computes what ``Generation`` computes for greedy decoding with full heads, from the parameters of
the same model, with the operations of the published implementation: logits of all prompt positions,
a key/value cache that grows by concatenation, grouped keys and values repeated for every head, one
product each for query, key, value, gate and up, and both tokens copied to the host at every step.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimia_infer.engine.generation import ControlTokens, DecodeInput
from kimia_infer.layers.attention import rotary_tables, rotate
from kimia_infer.models.kimi_audio.config import LanguageModelConfig
from kimia_infer.models.kimi_audio.language_model import (
    Attention,
    DecoderLayer,
    FeedForward,
    LanguageModel,
    RMSNorm,
)

KeysAndValues = tuple[Tensor, Tensor]


class PlainGeneration:
    """One greedy answer in text and speech; iterate :meth:`run`, then read the ids."""

    def __init__(
        self,
        model: LanguageModel,
        prompt: DecodeInput,
        control: ControlTokens,
        max_steps: int,
    ):
        self.model, self.prompt, self.control = model, prompt, control
        self.max_steps = max_steps
        self.text_ids: list[int] = []
        self.audio_ids: list[int] = []
        self.launched = 0
        self.text_finished = self.finished = False
        self._past: list[KeysAndValues | None] = [None] * model.config.total_layers

    @torch.inference_mode()
    def run(self) -> Iterator[int]:
        """Generate until the end token or the step limit; yields the steps done."""
        model, prompt = self.model, self.prompt
        capacity = prompt.length + self.max_steps
        cos, sin = rotary_tables(
            model.config.head_dim, model.config.rope_theta, capacity, model.device, model.dtype
        )
        x = model.embed(prompt.audio_ids, prompt.text_ids, prompt.is_continuous, prompt.features)
        position = 0
        for step in range(self.max_steps):
            span = slice(position, position + x.shape[1])
            position = span.stop
            text_logits, audio_logits = self._forward(x, cos[span], sin[span])
            text, audio = self._choose(step, _greedy(text_logits), _greedy(audio_logits))
            self.launched = step + 1
            yield self.launched
            if self.finished:
                return
            x = model.embedding(audio)
            if text.sum() != 0:
                x = x + model.embedding(text)

    def _choose(self, step: int, text: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Store the tokens, int64 [1, 1] each, and return the inputs of the next step."""
        text_id, audio_id = text.item(), audio.item()
        if self.text_finished:
            text.fill_(self.control.blank)
        elif text_id == self.control.text_end:
            self.text_finished = True
        else:
            self.text_ids.append(text_id)
        if step >= self.model.config.audio_delay:
            self.audio_ids.append(audio_id)
            self.finished = audio_id in self.control.audio_ends
        else:
            audio.fill_(self.control.blank)
        return text, audio

    def _forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Text and audio logits [1, length, vocabulary] of embeddings [1, length, hidden_size]."""
        model, config = self.model, self.model.config
        fork = x
        for index, layer in enumerate(model.layers):
            x = self._layer(layer, index, x, cos, sin)
            if index == config.fork_layer:
                fork = x.clone()
        for index, layer in enumerate(model.mimo_layers):
            fork = self._layer(layer, config.trunk_layers + index, fork, cos, sin)
        text_logits = _linear(model.text_head, _normalize(model.norm, x))
        return text_logits, _linear(model.audio_head, _normalize(model.mimo_norm, fork))

    def _layer(
        self, layer: DecoderLayer, index: int, x: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        normalized = _normalize(layer.attention_norm, x)
        mixed, self._past[index] = _attention(
            layer.attention, self.model.config, normalized, cos, sin, self._past[index]
        )
        x = x + mixed
        return x + _feed_forward(layer.feed_forward, _normalize(layer.feed_forward_norm, x))


def _greedy(logits: Tensor) -> Tensor:
    """The id int64 [1, 1] of the largest log-probability at the last position."""
    return torch.log_softmax(logits[:, -1].float(), dim=-1).argmax(dim=-1, keepdim=True)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """``nn.Linear.forward``, whatever replaces it in the library."""
    return F.linear(x, layer.weight, layer.bias)


def _normalize(norm: RMSNorm, x: Tensor) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + norm.eps)
    return norm.weight * wide.to(x.dtype)


def _attention(
    attention: Attention,
    config: LanguageModelConfig,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    past: KeysAndValues | None,
) -> tuple[Tensor, KeysAndValues]:
    # Runs of rows of the joined matrix: separate products without a second copy of the weights.
    rows = [n * config.head_dim for n in (config.heads, *[config.kv_heads] * 2)]
    weights, biases = attention.qkv.weight.split(rows), attention.qkv.bias.split(rows)
    query, keys, values = (
        F.linear(x, weight, bias).unflatten(-1, (-1, config.head_dim)).transpose(1, 2)
        for weight, bias in zip(weights, biases, strict=True)
    )
    query, keys = rotate(query, cos, sin), rotate(keys, cos, sin)
    if past is not None:
        keys, values = torch.cat([past[0], keys], dim=2), torch.cat([past[1], values], dim=2)
    group = config.heads // config.kv_heads
    mixed = F.scaled_dot_product_attention(
        query,
        keys.repeat_interleave(group, dim=1),
        values.repeat_interleave(group, dim=1),
        is_causal=past is None,
    )
    return _linear(attention.output, mixed.transpose(1, 2).flatten(2)), (keys, values)


def _feed_forward(feed_forward: FeedForward, x: Tensor) -> Tensor:
    gate, up = feed_forward.gate_up.weight.chunk(2)
    return _linear(feed_forward.down, F.silu(F.linear(x, gate)) * F.linear(x, up))
