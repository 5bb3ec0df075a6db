"""Sizes of the network and its symbols, read from the published ``config.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kimia_infer.models.kokoro.layout import CONFIG_NAME, FETCH
from kimia_infer.utils.errors import CheckpointError, explain
from kimia_infer.weights.component import read_json

SAMPLE_RATE = 24_000
HARMONICS = 9
"""Sines of the source: the fundamental and eight overtones, published implementation."""

Size = Annotated[int, Field(ge=1)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


class AlbertSizes(_Part):
    """The text encoder that prosody is predicted from; one layer, applied many times."""

    hidden_size: Size
    num_attention_heads: Size
    intermediate_size: Size
    max_position_embeddings: Size
    num_hidden_layers: Size
    embedding_size: Size = 128  # the default of ALBERT, which the file leaves out


class GeneratorSizes(_Part):
    """From decoder features to the spectrum of the wave."""

    upsample_rates: list[Size]
    upsample_kernel_sizes: list[Size]
    upsample_initial_channel: Size
    resblock_kernel_sizes: list[Size]
    resblock_dilation_sizes: list[list[Size]]
    gen_istft_n_fft: Size
    gen_istft_hop_size: Size

    @model_validator(mode="after")
    def _fits(self) -> GeneratorSizes:
        if len(self.upsample_rates) != len(self.upsample_kernel_sizes):
            raise ValueError("upsample_rates and upsample_kernel_sizes must have one length")
        if len(self.resblock_kernel_sizes) != len(self.resblock_dilation_sizes):
            raise ValueError("resblock kernels and dilations must have one length")
        if self.gen_istft_n_fft != 4 * self.gen_istft_hop_size:
            raise ValueError("gen_istft_n_fft must be four times gen_istft_hop_size")
        return self

    @property
    def bins(self) -> int:
        """Frequencies of a spectrum."""
        return self.gen_istft_n_fft // 2 + 1

    @property
    def frame_samples(self) -> int:
        """Samples of the wave for each value of the pitch curve."""
        product = self.gen_istft_hop_size
        for rate in self.upsample_rates:
            product *= rate
        return product


class KokoroConfig(_Part):
    """What of the published configuration describes the network; the rest is of its training."""

    hidden_dim: Size
    style_dim: Size
    n_layer: Size
    n_token: Size
    max_dur: Size
    text_encoder_kernel_size: Size
    multispeaker: Literal[True]
    istftnet: GeneratorSizes
    plbert: AlbertSizes
    vocab: dict[str, int]

    @model_validator(mode="after")
    def _has_symbols(self) -> KokoroConfig:
        for symbol, index in self.vocab.items():
            if len(symbol) != 1 or not 0 < index < self.n_token:
                raise ValueError(f"vocab[{symbol!r}] = {index}: one character and 1 .. n_token - 1")
        return self

    @classmethod
    def from_directory(cls, directory: Path) -> KokoroConfig:
        """Raises CheckpointError naming the file and the field."""
        path = directory / CONFIG_NAME
        if not path.is_file():
            raise CheckpointError(f"{path}: file missing; {FETCH}")
        try:
            return cls.model_validate(read_json(path))
        except ValidationError as error:
            raise CheckpointError(f"{path}: {explain(error, cls)[0]}") from error

    @property
    def frame_samples(self) -> int:
        """Samples of one frame, the unit of durations: 600, or 25 ms."""
        return 2 * self.istftnet.frame_samples

    @property
    def max_phonemes(self) -> int:
        """Of one utterance, without its two boundary symbols."""
        return self.plbert.max_position_embeddings - 2
