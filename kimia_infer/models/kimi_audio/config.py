"""Sizes of the networks, read from the published configuration files.

Every field of a configuration names the published field it is read from and what that may hold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import yaml

from kimia_infer.utils.errors import CheckpointError
from kimia_infer.weights.component import read_json

if TYPE_CHECKING:
    from transformers import WhisperConfig

SIZE, COUNT, NUMBER = "a positive integer", "an integer from 0 up", "a number"
SIZES, LISTS_OF_SIZES = "a list of sizes", "a list of lists of sizes"


def check_kind(value: Any, kind: str, name: str, source: str | Path) -> None:
    """Raise CheckpointError unless the field ``name`` of ``source`` holds what ``kind`` says."""
    if not _is(value, kind):
        raise CheckpointError(f"{source}: {name} must be {kind}, found {value!r}")


def _is(value: Any, kind: str) -> bool:
    if kind in (SIZE, COUNT):
        return type(value) is int and value >= (kind == SIZE)
    if kind == NUMBER:
        return type(value) in (int, float)
    item = SIZE if kind == SIZES else SIZES
    return isinstance(value, list) and len(value) > 0 and all(_is(each, item) for each in value)


def check_fixed(
    values: Mapping[str, object], fixed: Mapping[str, object], source: str | Path
) -> None:
    """Raise CheckpointError unless every field of ``fixed`` has its one supported value."""
    for name, expected in fixed.items():
        if values.get(name) != expected:
            raise CheckpointError(
                f"{source}: {name} = {values.get(name)!r} is not supported, only {expected!r} is"
            )


def published(path: str, kind: str = SIZE, default: float | None = None) -> Any:
    """A field that is read from ``path``, the names of nested mappings with dots between."""
    return field(metadata={"path": path, "kind": kind, "default": default})


class PublishedConfig:
    """A dataclass of :func:`published` fields."""

    FILE: ClassVar[str]
    FIXED: ClassVar[dict[str, object]]
    """Variants that the configuration can name, and the only one that this architecture has."""

    @classmethod
    def from_dict(cls, values: Any, source: str | None = None) -> Self:
        """From published fields; raises CheckpointError naming ``source`` and a bad field."""
        source = source or cls.FILE
        check_fixed({path: _lookup(values, path) for path in cls.FIXED}, cls.FIXED, source)
        found = {}
        for each in fields(cls):  # pyrefly: ignore[bad-argument-type]
            path, value = each.metadata["path"], _lookup(values, each.metadata["path"])
            value = each.metadata["default"] if value is None else value
            check_kind(value, each.metadata["kind"], path, source)
            found[each.name] = _tuples(value)
        config = cls(**found)
        for rule, holds in config.rules(values).items():
            if not holds:
                raise CheckpointError(f"{source}: {rule}")
        return config

    @classmethod
    def from_directory(cls, directory: Path) -> Self:
        """From the file of a checkpoint's folder; raises CheckpointError."""
        path = directory / cls.FILE
        read = read_json if path.suffix == ".json" else _read_yaml
        return cls.from_dict(read(path), str(path))

    def rules(self, values: dict) -> dict[str, bool]:
        """What must be true of several fields together, in words, and whether it is."""
        raise NotImplementedError


def _lookup(values: Any, path: str) -> Any:
    for key in path.split("."):
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: file missing") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path}: not valid YAML ({error})") from error


@dataclass(frozen=True)
class LanguageModelConfig(PublishedConfig):
    """Architecture of the dual-track model; lengths count layers, heads or vocabulary rows.

    ``fork_layer`` is the index of the last layer that both tracks share. Ids below
    ``base_tokens`` are text, ids from ``token_offset`` up are speech codes, special tokens
    lie between. ``audio_delay`` is the number of steps the audio track lags behind.
    """

    FILE = "config.json"
    FIXED: ClassVar = {"hidden_act": "silu", "rope_scaling": None, "tie_word_embeddings": False}

    vocab_size: int = published("vocab_size")
    hidden_size: int = published("hidden_size")
    intermediate_size: int = published("intermediate_size")
    trunk_layers: int = published("num_hidden_layers")
    heads: int = published("num_attention_heads")
    kv_heads: int = published("num_key_value_heads")
    rms_norm_eps: float = published("rms_norm_eps", NUMBER)
    rope_theta: float = published("rope_theta", NUMBER)
    max_positions: int = published("max_position_embeddings")
    base_tokens: int = published("num_base_tokens")
    token_offset: int = published("kimia_token_offset")
    adaptor_input_dim: int = published("kimia_adaptor_input_dim")
    mimo_layers: int = published("kimia_mimo_layers", COUNT)
    fork_layer: int = published("kimia_mimo_transformer_from_layer_index", COUNT)
    audio_delay: int = published("kimia_mimo_audiodelaytokens", COUNT)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads

    @property
    def total_layers(self) -> int:
        """Layers that own a key/value cache: the trunk's, then the MIMO branch's."""
        return self.trunk_layers + self.mimo_layers

    @classmethod
    def from_dict(cls, values: Any, source: str | None = None) -> Self:
        values = {**cls.FIXED, **values}  # these may be left out
        if values.get("num_key_value_heads") is None:  # no grouping, as in Qwen2
            values["num_key_value_heads"] = values.get("num_attention_heads")
        return super().from_dict(values, source)

    def rules(self, values: dict) -> dict[str, bool]:
        return {
            "hidden_size must be a multiple of num_attention_heads": (
                self.hidden_size % self.heads == 0
            ),
            "num_attention_heads must be a multiple of num_key_value_heads": (
                self.heads % self.kv_heads == 0
            ),
            "kimia_mimo_transformer_from_layer_index must name a trunk layer": (
                self.fork_layer < self.trunk_layers
            ),
            "num_base_tokens <= kimia_token_offset < vocab_size must hold": (
                self.base_tokens <= self.token_offset < self.vocab_size
            ),
        }


@dataclass(frozen=True)
class DiTConfig(PublishedConfig):
    """Sizes of the network and the statistics of the mel spectrogram.

    ``codes`` is the size of the code book; the embedding has one more row, which training used
    for dropped conditions. A mel value is ``x * mel_std + mel_mean`` with x as the network sees it.
    Positions are divided by ``rope_interpolation``.
    """

    FILE = "config.yaml"
    FIXED: ClassVar = {
        "model.dit.position_embedding_type": "skip",
        "model.dit.use_rope": True,
        "model.dit.ffn_type": "vanilla_mlp",
    }

    depth: int = published("model.dit.depth")
    hidden_size: int = published("model.dit.hidden_size")
    heads: int = published("model.dit.num_heads")
    mlp_ratio: float = published("model.dit.mlp_ratio", NUMBER)
    mel_bins: int = published("model.dit.input_size")
    codes: int = published("model.dit.semantic_vocab_size")
    rope_base: float = published("model.dit.rope_params.rope_base", NUMBER, 10000.0)
    rope_interpolation: float = published(
        "model.dit.rope_params.rope_interpolation_factor", NUMBER, 1.0
    )
    mel_mean: float = published("mel_mean", NUMBER)
    mel_std: float = published("mel_std", NUMBER)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads

    @classmethod
    def from_dict(cls, values: Any, source: str | None = None) -> Self:
        if _lookup(values, "normalize_mel") is False:
            values = {**values, "mel_mean": 0.0, "mel_std": 1.0}
        return super().from_dict(values, source)

    def rules(self, values: dict) -> dict[str, bool]:
        return {
            "normalize_mel must be true or false": isinstance(values.get("normalize_mel"), bool),
            "model.dit.hidden_size must be an even multiple of model.dit.num_heads": (
                self.hidden_size % (2 * self.heads) == 0
            ),
        }


@dataclass(frozen=True)
class VocoderConfig(PublishedConfig):
    """Sizes of the generator. ``hop_size`` samples of ``sample_rate`` Hz come from each frame.

    Stage i multiplies the rate by ``upsample_rates[i]`` and halves the channels; in each stage
    there is one residual block per entry of ``resblock_kernel_sizes``.
    """

    FILE = "config.json"
    FIXED: ClassVar = {
        "resblock": "1",
        "activation": "snakebeta",
        "snake_logscale": True,
        "use_tanh_at_final": False,
        "use_bias_at_final": False,
    }

    mel_bins: int = published("num_mels")
    initial_channels: int = published("upsample_initial_channel")
    upsample_rates: tuple[int, ...] = published("upsample_rates", SIZES)
    upsample_kernel_sizes: tuple[int, ...] = published("upsample_kernel_sizes", SIZES)
    resblock_kernel_sizes: tuple[int, ...] = published("resblock_kernel_sizes", SIZES)
    resblock_dilation_sizes: tuple[tuple[int, ...], ...] = published(
        "resblock_dilation_sizes", LISTS_OF_SIZES
    )
    sample_rate: int = published("sampling_rate")

    @property
    def hop_size(self) -> int:
        return math.prod(self.upsample_rates)

    def rules(self, values: dict) -> dict[str, bool]:
        stages = list(zip(self.upsample_rates, self.upsample_kernel_sizes, strict=False))
        return {
            "upsample_rates and upsample_kernel_sizes must be equally long": (
                len(self.upsample_rates) == len(self.upsample_kernel_sizes)
            ),
            "each upsample_kernel_sizes entry must exceed its rate by an even number": all(
                kernel >= rate and (kernel - rate) % 2 == 0 for rate, kernel in stages
            ),
            "the product of upsample_rates must be hop_size": (
                self.hop_size == values.get("hop_size")
            ),
            "upsample_initial_channel must leave a channel when halved once per stage": (
                self.initial_channels >= 2 ** len(self.upsample_rates)
            ),
            "resblock_kernel_sizes and resblock_dilation_sizes must be equally long": (
                len(self.resblock_kernel_sizes) == len(self.resblock_dilation_sizes)
            ),
            "resblock_kernel_sizes must be odd": all(k % 2 for k in self.resblock_kernel_sizes),
        }


FRAMES_PER_CODE = 4
"""Encoder frames (50 per second) joined to one feature vector (12.5 per second)."""

POSITIONS = 1_500
"""Encoder frames of a segment (published configuration)."""

ENCODER_SIZES = (
    "d_model",
    "encoder_layers",
    "encoder_attention_heads",
    "encoder_ffn_dim",
    "num_mel_bins",
)
ENCODER_FIXED = {"max_source_positions": POSITIONS, "activation_function": "gelu"}


def encoder_config(values: Mapping[str, Any], source: Path) -> WhisperConfig:
    """The encoder that a published ``config.json`` describes, without dropout, with SDPA.

    Raises:
        CheckpointError: a field is missing or has a wrong value; ``source`` is named.
    """
    for name in ENCODER_SIZES:
        check_kind(values.get(name), SIZE, name, source)
    check_fixed({**ENCODER_FIXED, **values}, ENCODER_FIXED, source)  # both may be left out
    if values["d_model"] % values["encoder_attention_heads"]:
        raise CheckpointError(f"{source}: d_model is not a multiple of encoder_attention_heads")
    from transformers import WhisperConfig

    return WhisperConfig(
        **{name: values[name] for name in ENCODER_SIZES},
        **ENCODER_FIXED,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        encoder_layerdrop=0.0,
        attn_implementation="sdpa",  # pyrefly: ignore[unexpected-keyword]
    )


TOKENIZER_FIXED = {
    "pooling_type": "avg",
    "pooling_kernel_size": FRAMES_PER_CODE,
    "quantize_encoder_only": True,
    "quantize_causal_encoder": False,
    "encoder_causal_convolution": True,
    "encoder_causal_attention": False,
}
"""Fields of the published configuration that select the one network implemented here."""

TOKENIZER_LEFT_OUT = {"quantize_causal_encoder": False, "encoder_causal_attention": False}
"""Values of fields that a configuration leaves out (published implementation)."""


@dataclass(frozen=True)
class SpeechTokenizerConfig:
    """The encoder dimensions, of which ``layers`` layers are used, and its quantizer.

    ``block_frames`` is the number of 20 ms frames that see each other in both directions.
    """

    encoder: WhisperConfig
    layers: int
    codebook_size: int
    block_frames: int

    @classmethod
    def from_json(cls, values: Mapping[str, Any], source: Path) -> SpeechTokenizerConfig:
        """From the fields of a published ``config.json``; ``source`` names it in errors.

        Raises:
            CheckpointError: a field is missing or selects a network that is not published.
        """
        fields = ("quantize_position", "quantize_vocab_size", "quantize_causal_block_size")
        for name in fields:
            check_kind(values.get(name), SIZE, name, source)
        position, codebook_size, block_frames = (values[name] for name in fields)
        fixed = {**TOKENIZER_FIXED, "pooling_position": position}
        check_fixed({**TOKENIZER_LEFT_OUT, **values}, fixed, source)
        return cls(encoder_config(values, source), position, codebook_size, block_frames)
