"""Sizes of the networks, read from the published configuration files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from kimia_infer.utils.errors import CheckpointError
from kimia_infer.weights.component import read_json


def check_fixed(
    values: Mapping[str, object], fixed: Mapping[str, object], source: str | Path
) -> None:
    """Raise CheckpointError unless every field of ``fixed`` has its one supported value."""
    for name, expected in fixed.items():
        if values.get(name) != expected:
            raise CheckpointError(
                f"{source}: {name} = {values.get(name)!r} is not supported, only {expected!r} is"
            )


def _check_rules(rules: Mapping[str, bool], source: str) -> None:
    """Raise CheckpointError naming the first rule that does not hold."""
    for rule, holds in rules.items():
        if not holds:
            raise CheckpointError(f"{source}: {rule}")


# Published field name -> field of LanguageModelConfig.
_LANGUAGE_MODEL_FIELDS = {
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
_LANGUAGE_MODEL_FIXED = {"hidden_act": "silu", "rope_scaling": None, "tie_word_embeddings": False}


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
        check_fixed({**_LANGUAGE_MODEL_FIXED, **values}, _LANGUAGE_MODEL_FIXED, source)
        fields: dict[str, Any] = {}
        for name, field in _LANGUAGE_MODEL_FIELDS.items():
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
        _check_rules(rules, source)


# Variants that the configuration can name but this architecture does not have.
_DIT_FIXED = {
    "model.dit.position_embedding_type": "skip",
    "model.dit.use_rope": True,
    "model.dit.ffn_type": "vanilla_mlp",
}


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of the network and the statistics of the mel spectrogram.

    ``codes`` is the size of the code book; the embedding has one more row, which training used
    for dropped conditions. A mel value is ``x * mel_std + mel_mean`` with x as the network sees it.
    Positions are divided by ``rope_interpolation``.
    """

    depth: int
    hidden_size: int
    heads: int
    mlp_ratio: float
    mel_bins: int
    codes: int
    rope_base: float
    rope_interpolation: float
    mel_mean: float
    mel_std: float

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads

    @classmethod
    def from_dict(cls, values: dict, source: str = "config.yaml") -> DiTConfig:
        """Build from the published structure; raises CheckpointError naming a bad field."""
        check_fixed({path: _lookup(values, path) for path in _DIT_FIXED}, _DIT_FIXED, source)

        def number(path: str, default: float | None = None) -> Any:
            value = _lookup(values, path)
            value = default if value is None else value
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise CheckpointError(f"{source}: {path} must be a number, found {value!r}")
            return value

        def size(path: str) -> int:
            value = number(path)
            if not isinstance(value, int) or value < 1:
                raise CheckpointError(f"{source}: {path} must be a positive integer, not {value!r}")
            return value

        normalized = _lookup(values, "normalize_mel")
        if not isinstance(normalized, bool):
            raise CheckpointError(
                f"{source}: normalize_mel must be true or false, not {normalized!r}"
            )
        config = cls(
            depth=size("model.dit.depth"),
            hidden_size=size("model.dit.hidden_size"),
            heads=size("model.dit.num_heads"),
            mlp_ratio=number("model.dit.mlp_ratio"),
            mel_bins=size("model.dit.input_size"),
            codes=size("model.dit.semantic_vocab_size"),
            rope_base=number("model.dit.rope_params.rope_base", 10000.0),
            rope_interpolation=number("model.dit.rope_params.rope_interpolation_factor", 1.0),
            mel_mean=number("mel_mean") if normalized else 0.0,
            mel_std=number("mel_std") if normalized else 1.0,
        )
        if config.hidden_size % (2 * config.heads):
            raise CheckpointError(
                f"{source}: model.dit.hidden_size must be an even multiple of model.dit.num_heads"
            )
        return config

    @classmethod
    def from_directory(cls, directory: Path) -> DiTConfig:
        """Read ``config.yaml`` of the checkpoint's ``audio_detokenizer`` folder."""
        path = directory / "config.yaml"
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CheckpointError(f"{path}: file missing") from error
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise CheckpointError(f"{path}: not valid YAML ({error})") from error
        return cls.from_dict(values, str(path))


def _lookup(values: Any, path: str) -> Any:
    """The entry of nested mappings that a dotted path names, or None."""
    for key in path.split("."):
        values = values.get(key) if isinstance(values, dict) else None
    return values


# Variants that the configuration can name but this architecture does not have.
_VOCODER_FIXED = {
    "resblock": "1",
    "activation": "snakebeta",
    "snake_logscale": True,
    "use_tanh_at_final": False,
    "use_bias_at_final": False,
}


@dataclass(frozen=True)
class VocoderConfig:
    """Sizes of the generator. ``hop_size`` samples of ``sample_rate`` Hz come from each frame.

    Stage i multiplies the rate by ``upsample_rates[i]`` and halves the channels; in each stage
    there is one residual block per entry of ``resblock_kernel_sizes``.
    """

    mel_bins: int
    initial_channels: int
    upsample_rates: tuple[int, ...]
    upsample_kernel_sizes: tuple[int, ...]
    resblock_kernel_sizes: tuple[int, ...]
    resblock_dilation_sizes: tuple[tuple[int, ...], ...]
    sample_rate: int

    @property
    def hop_size(self) -> int:
        return math.prod(self.upsample_rates)

    @classmethod
    def from_dict(cls, values: dict, source: str = "config.json") -> VocoderConfig:
        """Build from published fields; raises CheckpointError naming a bad field."""
        check_fixed(values, _VOCODER_FIXED, source)

        def size(name: str) -> int:
            return _sizes(values.get(name), 0, f"{source}: {name}")

        def sizes(name: str, depth: int = 1) -> tuple:
            return _sizes(values.get(name), depth, f"{source}: {name}")

        config = cls(
            mel_bins=size("num_mels"),
            initial_channels=size("upsample_initial_channel"),
            upsample_rates=sizes("upsample_rates"),
            upsample_kernel_sizes=sizes("upsample_kernel_sizes"),
            resblock_kernel_sizes=sizes("resblock_kernel_sizes"),
            resblock_dilation_sizes=sizes("resblock_dilation_sizes", depth=2),
            sample_rate=size("sampling_rate"),
        )
        config._check(source, size("hop_size"))
        return config

    @classmethod
    def from_directory(cls, directory: Path) -> VocoderConfig:
        """Read ``config.json`` of the checkpoint's ``vocoder`` folder."""
        path = directory / "config.json"
        return cls.from_dict(read_json(path), str(path))

    def _check(self, source: str, hop_size: int) -> None:
        stages = list(zip(self.upsample_rates, self.upsample_kernel_sizes, strict=False))
        rules = {
            "upsample_rates and upsample_kernel_sizes must be equally long": (
                len(self.upsample_rates) == len(self.upsample_kernel_sizes)
            ),
            "each upsample_kernel_sizes entry must exceed its rate by an even number": all(
                kernel >= rate and (kernel - rate) % 2 == 0 for rate, kernel in stages
            ),
            "the product of upsample_rates must be hop_size": self.hop_size == hop_size,
            "upsample_initial_channel must leave a channel when halved once per stage": (
                self.initial_channels >= 2 ** len(self.upsample_rates)
            ),
            "resblock_kernel_sizes and resblock_dilation_sizes must be equally long": (
                len(self.resblock_kernel_sizes) == len(self.resblock_dilation_sizes)
            ),
            "resblock_kernel_sizes must be odd": all(k % 2 for k in self.resblock_kernel_sizes),
        }
        _check_rules(rules, source)


def _sizes(value: Any, depth: int, field: str) -> Any:
    """A positive integer (depth 0) or nested non-empty lists of them, as tuples."""
    if depth == 0 and isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if depth > 0 and isinstance(value, list) and value:
        return tuple(_sizes(item, depth - 1, field) for item in value)
    kind = "a positive integer" if depth == 0 else "a list of sizes"
    raise CheckpointError(f"{field} must be {kind}, found {value!r}")
