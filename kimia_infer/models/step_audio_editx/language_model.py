"""The language model: Llama's layers without rotation, with a bias that grows as sqrt(distance).

The published code computes the bias for all pairs of positions in every layer and at every step.
Here it is computed once a call, for the rows of the new tokens alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimia_infer.models.step_audio_editx.config import LanguageModelConfig

if TYPE_CHECKING:  # importing it takes seconds, so it waits until a model is built
    from transformers import LlamaConfig

ATTENTION = "biased_groups"
"""The name by which transformers finds :func:`_attend`."""

PREFILL_TOKENS = 512
"""Prompt tokens that are computed at once, which bounds the memory of their bias."""


def slopes(heads: int) -> list[float]:
    """ALiBi's slopes: powers of one ratio, and between them those of twice as many heads."""
    base = 2 ** math.floor(math.log2(heads))
    first = [2 ** (-8 * k / base) for k in range(1, base + 1)]
    return first + [2 ** (-4 * k / base) for k in range(1, 2 * (heads - base), 2)]


def distance_bias(
    positions: Tensor, length: int, head_slopes: Tensor, dtype: torch.dtype
) -> Tensor:
    """-slope * sqrt(distance) [heads, queries, length], -inf for keys behind the query.

    Computed in float32 from ``positions`` int64 [queries] of the queries and ``head_slopes``.
    """
    distance = positions[:, None] - torch.arange(length, device=positions.device)
    bias = -head_slopes[:, None, None] * distance.clamp(min=0).float().sqrt()
    return bias.masked_fill(distance < 0, -math.inf).to(dtype)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of query [1, heads, n, dim] over key, value [1, groups, length, dim].

    Heads that share keys take the place of more queries, so that keys are not repeated.
    ``attention_mask`` is the bias [heads, n, length].
    """
    assert attention_mask is not None
    groups, queries = key.shape[1], query.shape[2]
    shared = query.unflatten(1, (groups, -1)).flatten(2, 3)
    bias = attention_mask.unflatten(0, (groups, -1)).flatten(1, 2)[None]
    mixed = F.scaled_dot_product_attention(shared, key, value, attn_mask=bias, scale=scaling)
    return mixed.unflatten(2, (-1, queries)).flatten(1, 2).transpose(1, 2), None


class KeyValueCache:
    """Keys and values [layers, groups, positions, head_dim] of one sequence, allocated once.

    Layers call :meth:`update`, as they do with a cache of transformers. What is stored stands at
    ``place`` int64 [tokens], and what is read is the first ``length`` positions.
    """

    def __init__(
        self, config: LanguageModelConfig, positions: int, device: torch.device, dtype: torch.dtype
    ):
        shape = (config.layers, config.groups, positions, config.head_size)
        self._keys = torch.zeros(shape, device=device, dtype=dtype)
        self._values = torch.zeros_like(self._keys)
        self.place = torch.zeros(0, dtype=torch.int64, device=device)
        self.length = 0

    @property
    def positions(self) -> int:
        return self._keys.shape[2]

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Store [1, groups, tokens, head_dim] of a layer, and return all that it attends to."""
        for stored, new in ((self._keys[layer], keys), (self._values[layer], values)):
            stored.index_copy_(1, self.place, new[0])
        return (
            self._keys[layer, None, :, : self.length],
            self._values[layer, None, :, : self.length],
        )


class Trunk(nn.Module):
    def __init__(self, config: LanguageModelConfig):
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

        super().__init__()
        llama = llama_config(config)
        self.embed_tokens = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(LlamaDecoderLayer(llama, i) for i in range(config.layers))
        self.norm = LlamaRMSNorm(config.width, eps=config.norm_eps)


def llama_config(config: LanguageModelConfig) -> LlamaConfig:
    """What transformers builds layers from, with :func:`_attend` as their attention."""
    from transformers import AttentionInterface, LlamaConfig

    AttentionInterface.register(ATTENTION, _attend)
    return LlamaConfig(
        vocab_size=config.vocabulary,
        hidden_size=config.width,
        intermediate_size=config.inner,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.groups,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=False,
        attn_implementation=ATTENTION,  # pyrefly: ignore[unexpected-keyword]
    )


class LanguageModel(nn.Module):
    """Parameters are named as in the published checkpoint; no bias, and the head is not tied."""

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.width, config.vocabulary, bias=False)

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def new_cache(self, positions: int) -> KeyValueCache:
        """An empty cache of at most ``positions``."""
        return KeyValueCache(self.config, positions, self.device, self.lm_head.weight.dtype)

    def hidden_states(
        self, ids: Tensor, positions: Tensor, length: int, cache: KeyValueCache
    ) -> list[Tensor]:
        """The embeddings, then what each layer gives, the last one normalized; [tokens, width].

        Args:
            ids: int64 [tokens], at ``positions`` int64 [tokens], one after the other.
            length: of the cache that is read; every position is below it.
            cache: holds the tokens before.
        """
        x = self.model.embed_tokens(ids)[None]
        head_slopes = torch.tensor(slopes(self.config.heads), device=x.device)
        bias = distance_bias(positions, length, head_slopes, x.dtype)
        unrotated = x.new_ones(1, 1, 1), x.new_zeros(1, 1, 1)
        cache.place, cache.length = positions, length
        states = [x[0]]
        for layer in self.model.layers:
            x = layer(x, attention_mask=bias, past_key_values=cache, position_embeddings=unrotated)
            states.append(x[0])
        states[-1] = self.model.norm(x)[0]
        return states

    def read(self, ids: Sequence[int], cache: KeyValueCache, start: int = 0) -> Tensor:
        """Put a prompt's ids from position ``start`` on into the cache; the last logits [ids]."""
        hidden = None
        for first in range(0, len(ids), PREFILL_TOKENS):
            part = torch.tensor(ids[first : first + PREFILL_TOKENS], device=self.device)
            end = start + first + len(part)
            positions = torch.arange(end - len(part), end, device=self.device)
            hidden = self.hidden_states(part, positions, end, cache)[-1]
        assert hidden is not None
        return self.lm_head(hidden[-1])

    def step(self, token: Tensor, position: int, cache: KeyValueCache) -> Tensor:
        """The logits [ids] behind ``token`` int64 [1], which stands at ``position``."""
        at = torch.tensor([position], device=self.device)
        return self.lm_head(self.hidden_states(token, at, position + 1, cache)[-1][-1])
