"""Sizes of the networks, read from the published configuration files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

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
    ahead: Size = Field(alias="pre_lookahead_len")
    blocks: Size = Field(alias="num_blocks")
    up_blocks: Size = Field(alias="num_up_blocks")
    rate: Literal[2] = Field(alias="up_stride")
    heads: Size = Field(alias="attention_heads")
    inner: Size = Field(alias="linear_units")


class DiTConfig(_Part):
    """``flow.decoder.estimator``."""

    inputs: Size = Field(alias="in_channels")
    outputs: Size = Field(alias="out_channels")
    mlp_ratio: float
    depth: Size
    heads: Size = Field(alias="num_heads")
    head_size: Size = Field(alias="head_dim")
    width: Size = Field(alias="hidden_size")


class DecoderConfig(_Part):
    """``flow.decoder``."""

    estimator: DiTConfig
    guidance: float = Field(alias="inference_cfg_rate")


class FlowConfig(_Part):
    """``flow``."""

    width: Size = Field(alias="input_size")
    mel_bins: Size = Field(alias="output_size")
    speaker: Size = Field(alias="spk_embed_dim")
    rows: Literal[5121] = Field(alias="vocab_size")
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

    size: Size = Field(alias="n_fft")
    hop: Size = Field(alias="hop_len")

    @property
    def bins(self) -> int:
        return self.size // 2 + 1

    @property
    def values(self) -> int:
        return self.size + 2


class PitchConfig(_Part):
    """``hift.f0_predictor``."""

    width: Size = Field(alias="cond_channels")


class VocoderConfig(_Part):
    """``hift``."""

    mel_bins: Size = Field(alias="in_channels")
    width: Size = Field(alias="base_channels")
    overtones: Size = Field(alias="nb_harmonics")
    sample_rate: Literal[24_000] = Field(alias="sampling_rate")
    rates: list[Size] = Field(alias="upsample_rates")
    kernels: list[Size] = Field(alias="upsample_kernel_sizes")
    spectrum: SpectrumConfig = Field(alias="istft_params")
    block_kernels: list[Size] = Field(alias="resblock_kernel_sizes")
    block_dilations: list[list[Size]] = Field(alias="resblock_dilation_sizes")
    source_block_kernels: list[Size] = Field(alias="source_resblock_kernel_sizes")
    source_block_dilations: list[list[Size]] = Field(alias="source_resblock_dilation_sizes")
    slope: float = Field(alias="lrelu_slope")
    limit: float = Field(alias="audio_limit")
    pitch: PitchConfig = Field(alias="f0_predictor")

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


Part = TypeVar("Part", bound=_Part)


def _validated(kind: type[Part], values: Any, path: Path) -> Part:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {explain(error, kind)[0]}") from error
