"""Sizes of the networks, read from the published configuration files.

Fields that a file leaves out have the defaults of the published classes.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kimia_infer.utils.errors import CheckpointError, explain
from kimia_infer.weights.component import read_json

Size = Annotated[int, Field(ge=1)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", populate_by_name=True)


class LanguageModelConfig(_Part):
    """``config.json``."""

    model_type: Literal["step1"]
    width: Size = Field(alias="hidden_size")
    inner: Size = Field(alias="intermediate_size")
    layers: Size = Field(alias="num_hidden_layers")
    heads: Size = Field(alias="num_attention_heads")
    groups: Size = Field(alias="num_attention_groups")
    vocabulary: Size = Field(alias="vocab_size")
    norm_eps: float = Field(alias="rms_norm_eps")
    begin: int = Field(alias="bos_token_id")
    end: int = Field(alias="eos_token_id")

    @model_validator(mode="after")
    def _fits(self) -> LanguageModelConfig:
        if self.width % self.heads or self.heads % self.groups:
            raise ValueError("hidden_size must be a multiple of heads, and heads of groups")
        return self

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @classmethod
    def from_directory(cls, directory: Path) -> LanguageModelConfig:
        """Raises CheckpointError naming the file and the field."""
        path = directory / "config.json"
        return _validated(cls, read_json(path), path)


class EncoderConfig(_Part):
    """``flow.encoder`` of ``cosyvoice.yaml``."""

    inputs: Size = Field(alias="input_size")
    width: Size = Field(alias="output_size")
    ahead: Size = Field(default=3, alias="pre_lookahead_len")
    blocks: Size = Field(default=6, alias="num_blocks")
    up_blocks: Size = Field(default=4, alias="num_up_blocks")
    rate: Literal[2] = Field(default=2, alias="up_stride")
    heads: Size = Field(alias="attention_heads")
    inner: Size = Field(default=2048, alias="linear_units")


class DiTConfig(_Part):
    """``flow.decoder.estimator``."""

    inputs: Size = Field(alias="in_channels")
    outputs: Size = Field(alias="out_channels")
    mlp_ratio: float = 4.0
    depth: Size
    heads: Size = Field(alias="num_heads")
    head_size: Size = Field(alias="head_dim")
    width: Size = Field(alias="hidden_size")


class DecoderConfig(_Part):
    """``flow.decoder``."""

    estimator: DiTConfig
    guidance: float = Field(default=0.7, alias="inference_cfg_rate")


class FlowConfig(_Part):
    """``flow``."""

    width: Size = Field(alias="input_size")
    mel_bins: Size = Field(alias="output_size")
    speaker: Size = Field(default=192, alias="spk_embed_dim")
    rows: Literal[5121] = Field(default=5121, alias="vocab_size")
    encoder: EncoderConfig
    decoder: DecoderConfig

    @model_validator(mode="after")
    def _fits(self) -> FlowConfig:
        if self.width % 2 or self.width != self.encoder.inputs:
            raise ValueError("input_size must be even and that of the encoder")
        network = self.decoder.estimator
        if (network.inputs, network.outputs) != (4 * self.mel_bins, self.mel_bins):
            raise ValueError("the estimator needs 4 * output_size in_channels, and out_channels")
        return self


class SpectrumConfig(_Part):
    """``hift.istft_params``; in samples."""

    size: Size = Field(default=16, alias="n_fft")
    hop: Size = Field(default=4, alias="hop_len")

    @property
    def bins(self) -> int:
        return self.size // 2 + 1

    @property
    def values(self) -> int:
        return self.size + 2


class PitchConfig(_Part):
    """``hift.f0_predictor``."""

    width: Size = Field(default=512, alias="cond_channels")


class VocoderConfig(_Part):
    """``hift``."""

    mel_bins: Size = Field(alias="in_channels")
    width: Size = Field(default=512, alias="base_channels")
    overtones: Size = Field(default=8, alias="nb_harmonics")
    sample_rate: Literal[24_000] = Field(default=24_000, alias="sampling_rate")
    rates: list[Size] = Field(default=[8, 5, 3], alias="upsample_rates")
    kernels: list[Size] = Field(default=[16, 11, 7], alias="upsample_kernel_sizes")
    spectrum: SpectrumConfig = Field(default=SpectrumConfig(), alias="istft_params")
    block_kernels: list[Size] = Field(default=[3, 7, 11], alias="resblock_kernel_sizes")
    block_dilations: list[list[Size]] = Field(
        default=[[1, 3, 5]] * 3, alias="resblock_dilation_sizes"
    )
    source_block_kernels: list[Size] = Field(
        default=[7, 7, 11], alias="source_resblock_kernel_sizes"
    )
    source_block_dilations: list[list[Size]] = Field(
        default=[[1, 3, 5]] * 3, alias="source_resblock_dilation_sizes"
    )
    slope: float = Field(default=0.1, alias="lrelu_slope")
    limit: float = Field(default=0.99, alias="audio_limit")
    pitch: PitchConfig = Field(default=PitchConfig(), alias="f0_predictor")

    @model_validator(mode="after")
    def _fits(self) -> VocoderConfig:
        for name in ("kernels", "source_block_kernels", "source_block_dilations"):
            if len(getattr(self, name)) != len(self.rates):
                raise ValueError("upsample_rates and what belongs to them must have one length")
        if len(self.block_kernels) != len(self.block_dilations):
            raise ValueError("resblock kernels and dilations must have one length")
        return self

    @property
    def harmonics(self) -> int:
        """Sines of the source: the fundamental and its overtones."""
        return self.overtones + 1

    @property
    def frame_samples(self) -> int:
        """Samples of the wave for each frame of the mel spectrogram: 480, or 20 ms."""
        return math.prod(self.rates) * self.spectrum.hop

    @property
    def reach(self) -> int:
        """Frames before and behind a sample that it depends on, at most: 16, or 0.32 s."""
        frames, rate = 3.0 + 1, 1  # the first convolution, and edges of spectra
        widest = max(
            kernel // 2 * (sum(dilations) + len(dilations))
            for kernel, dilations in zip(self.block_kernels, self.block_dilations, strict=True)
        )
        for factor, kernel in zip(self.rates, self.kernels, strict=True):
            frames += kernel / (factor * rate)
            rate *= factor
            frames += widest / rate
        return math.ceil(frames)


class SoundConfig(_Part):
    """``cosyvoice.yaml``."""

    flow: FlowConfig
    hift: VocoderConfig

    @classmethod
    def from_directory(cls, directory: Path) -> SoundConfig:
        """Raises CheckpointError naming the file and the field."""
        path = directory / "cosyvoice.yaml"
        return _validated(cls, read_plain(path), path)


class SanmConfig(_Part):
    """``encoder_conf`` of the ``config.yaml`` of VQ02's encoder."""

    width: Size = Field(alias="output_size")
    heads: Size = Field(alias="attention_heads")
    inner: Size = Field(alias="linear_units")
    blocks: Size = Field(alias="num_blocks")
    kernel: Size = Field(alias="kernel_size")
    input_layer: Literal["pe_online"]
    shift: Literal[0] = Field(alias="sanm_shfit")


class RecognizerConfig(_Part):
    """That ``config.yaml``, of which only the encoder is used."""

    encoder: SanmConfig = Field(alias="encoder_conf")

    @classmethod
    def from_directory(cls, directory: Path) -> RecognizerConfig:
        """Raises CheckpointError naming the file and the field."""
        path = directory / "config.yaml"
        return _validated(cls, read_plain(path), path)


class _PlainLoader(yaml.SafeLoader):
    """Reads the value behind a tag such as ``!new:class``, and ignores the tag."""


class _Reference(str):
    """``!ref <name>``: the value of a field at the top of the file."""


def _plain(loader: yaml.SafeLoader, tag: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    text = str(node.value)
    return _Reference(text.strip("<> ")) if tag == "ref" else text or {}


_PlainLoader.add_multi_constructor("!", _plain)


def read_plain(path: Path) -> Any:
    """The fields of a YAML file whose tags name classes; no class is looked for."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _PlainLoader)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: file missing") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path}: not valid YAML ({error})") from error

    def resolved(value: Any) -> Any:
        if isinstance(value, _Reference):
            return values.get(str(value))
        if isinstance(value, dict):
            return {name: resolved(each) for name, each in value.items()}
        return [resolved(each) for each in value] if isinstance(value, list) else value

    return resolved(values)


Part = TypeVar("Part", bound=_Part)


def _validated(kind: type[Part], values: Any, path: Path) -> Part:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {explain(error, kind)[0]}") from error
