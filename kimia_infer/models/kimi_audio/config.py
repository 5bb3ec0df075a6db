"""Sizes of the language model, read from the published ``config.json``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kimia_infer.utils.errors import CheckpointError
from kimia_infer.weights.component import read_json

# Published field name -> field of LanguageModelConfig.
_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "trunk_layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "max_position_embeddings": "max_positions",
    "num_base_tokens": "base_tokens",
    "kimia_token_offset": "token_offset",
    "kimia_adaptor_input_dim": "adaptor_input_dim",
    "kimia_mimo_layers": "mimo_layers",
    "kimia_mimo_transformer_from_layer_index": "fork_layer",
    "kimia_mimo_audiodelaytokens": "audio_delay",
}
# Variants that the published class names but this architecture does not have.
_REQUIRED_VALUES = {"hidden_act": "silu", "rope_scaling": None, "tie_word_embeddings": False}


@dataclass(frozen=True)
class LanguageModelConfig:
    """Architecture of the dual-track model; lengths count layers, heads or vocabulary rows.

    ``fork_layer`` is the index of the last layer that both tracks share. Ids below
    ``base_tokens`` are text, ids from ``token_offset`` up are speech codes, special tokens
    lie between. ``audio_delay`` is the number of steps the audio track lags behind.
    ``stored_dtype`` is the dtype that the configuration announces for the weights.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    trunk_layers: int
    heads: int
    kv_heads: int
    rms_norm_eps: float
    rope_theta: float
    max_positions: int
    base_tokens: int
    token_offset: int
    adaptor_input_dim: int
    mimo_layers: int
    fork_layer: int
    audio_delay: int
    stored_dtype: torch.dtype = torch.bfloat16

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads

    @property
    def total_layers(self) -> int:
        """Layers that own a key/value cache: the trunk's, then the MIMO branch's."""
        return self.trunk_layers + self.mimo_layers

    @classmethod
    def from_dict(cls, values: dict, source: str = "config.json") -> LanguageModelConfig:
        """Build from published fields; raises CheckpointError naming a bad field."""
        for name, expected in _REQUIRED_VALUES.items():
            if values.get(name, expected) != expected:
                raise CheckpointError(f"{source}: {name} = {values[name]!r} is not supported")
        fields: dict[str, Any] = {}
        for name, field in _FIELDS.items():
            value = values.get(name)
            if name == "num_key_value_heads" and value is None:
                value = values.get("num_attention_heads")  # no grouping, as in Qwen2
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                raise CheckpointError(f"{source}: {name} must be a number, found {value!r}")
            fields[field] = value
        dtype = getattr(torch, str(values.get("torch_dtype") or "bfloat16"), None)
        if not isinstance(dtype, torch.dtype):
            raise CheckpointError(f"{source}: torch_dtype {values['torch_dtype']!r} is unknown")
        config = cls(**fields, stored_dtype=dtype)
        config._check(source)
        return config

    @classmethod
    def from_directory(cls, directory: Path) -> LanguageModelConfig:
        path = directory / "config.json"
        return cls.from_dict(read_json(path), str(path))

    def _check(self, source: str) -> None:
        rules = {
            "hidden_size must be a multiple of num_attention_heads": (
                self.heads > 0 and self.hidden_size % self.heads == 0
            ),
            "num_attention_heads must be a multiple of num_key_value_heads": (
                self.kv_heads > 0 and self.heads % self.kv_heads == 0
            ),
            "kimia_mimo_transformer_from_layer_index must name a trunk layer": (
                self.fork_layer < self.trunk_layers
            ),
            "num_base_tokens <= kimia_token_offset < vocab_size must hold": (
                self.base_tokens <= self.token_offset < self.vocab_size
            ),
        }
        for rule, holds in rules.items():
            if not holds:
                raise CheckpointError(f"{source}: {rule}")
