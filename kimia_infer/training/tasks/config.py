"""Settings of the training of the codec: detokenizer, vocoder, speech tokenizer."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from kimia_infer.training.config import Config, Items, Share, TrainingConfig

Positive = Annotated[int, Field(ge=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0)]
MeanDecay = Annotated[
    float,
    Field(ge=0, le=0.99999, description="decay of the average of weights that is written"),
]


class CodecTrainingConfig(TrainingConfig):
    """Settings of the training of every component of the codec."""

    data: str = Field(
        description="a directory of audio files, a list of paths, or JSON Lines with audio, text, "
        "codes"
    )
    cache_hours: float = Field(
        2.0, ge=0, description="hours of audio kept decoded in memory, per reading process"
    )
    initial: str | None = Field(
        None,
        description="folder of the component to start from, whose sizes and statistics are kept; "
        "by default new weights of the sizes below",
    )
    learning_rate: float = Field(1e-3, ge=0, description="largest of the schedule")
    weight_decay: float = Field(0.01, ge=0, description="of matrices; biases and norms have none")
    batch_size: int = Field(8, ge=1, description="samples per forward pass")
    workers: int = Field(0, ge=0, description="processes that read data")
    warmup_ratio: Share = Field(0.03, description="share of the steps over which the rate rises")
    gradient_checkpointing: bool = Field(
        False, description="recompute activations; less memory, slower"
    )

    def summary(self) -> dict[str, str]:
        return {"starts from": self.initial or "new weights"}

    def usage(self) -> str:
        export = "    scripts/export THIS_DIRECTORY NEW_MODEL --base MODEL\n"
        return f"{export}    scripts/serve --weights NEW_MODEL"


class DiTSize(Config):
    """Sizes of a new velocity network."""

    width: int = Field(192, ge=2, description="hidden size")
    depth: int = Field(4, ge=1, description="blocks")
    heads: int = Field(3, ge=1, description="attention heads")
    mlp_ratio: int = Field(4, ge=1, description="feed-forward size / width")


class DetokenizerTrainingConfig(CodecTrainingConfig):
    """Flow matching: the velocity network from codes and noise to mel frames."""

    title: ClassVar[str] = "Kimi-Audio's detokenizer, codes to mel frames"

    model: str = Field(
        description="checkpoint directory with the speech tokenizer and the vocoder's config.json"
    )
    size: DiTSize = Field(DiTSize(), description="of new weights")
    crop_codes: int = Field(40, ge=2, description="longest piece of a recording, in codes (80 ms)")
    min_chunk: float = Field(
        0.5, ge=0.08, description="shortest chunk in seconds (published configuration)"
    )
    max_chunk: float = Field(
        3.0, ge=0.08, description="longest chunk in seconds (published configuration)"
    )
    look_ahead_codes: int = Field(12, ge=0, description="most codes that a chunk sees ahead")
    condition_dropout: Share = Field(
        0.1, description="share of samples whose codes are dropped (published: 0.2)"
    )
    average: MeanDecay = 0.995

    @model_validator(mode="after")
    def _agrees(self) -> DetokenizerTrainingConfig:
        if self.max_chunk < self.min_chunk:
            raise ValueError(f"max_chunk: {self.max_chunk} is less than min_chunk")
        if self.size.width % (2 * self.size.heads):
            raise ValueError("size.width: must be an even multiple of size.heads")
        return self


class GeneratorSize(Config):
    """Sizes of a new vocoder; the product of the rates is the hop, 480 samples at 24 kHz."""

    channels: int = Field(192, ge=2, description="of the first stage; each further one has half")
    rates: Items[Positive] = Field((8, 5, 4, 3), description="upsampling of each stage")
    kernels: Items[Positive] = Field((16, 9, 8, 5), description="of the upsampling")
    block_kernels: Items[Positive] = Field((3,), description="of the residual blocks of a stage")
    dilations: Items[Positive] = Field((1, 3, 5), description="in a residual block")
    mel_bins: int = Field(80, ge=1, description="bands of the mel spectrogram")
    fmin: float = Field(0.0, ge=0, description="lower edge of the mel spectrogram in Hz")
    fmax: float = Field(8000.0, ge=1, description="upper edge of the mel spectrogram in Hz")


class VocoderTrainingConfig(CodecTrainingConfig):
    """The vocoder from mel frames to a waveform."""

    title: ClassVar[str] = "Kimi-Audio's vocoder, mel frames to a waveform"

    size: GeneratorSize = Field(GeneratorSize(), description="of new weights")
    crop_frames: int = Field(20, ge=8, description="piece of a recording, in mel frames (20 ms)")
    anti_aliased_from: float = Field(
        0.6,
        ge=0,
        le=0.95,
        description="share of the steps after which activations are anti-aliased, as they are "
        "served; before, steps are about three times faster",
    )
    mel_weight: Weight = Field(1.0, description="of the L1 of the log-mel spectrogram")
    adversarial: float | None = Field(
        None, gt=0, description="weight of the discriminators' losses; by default there are none"
    )
    average: MeanDecay = 0.995
    learning_rate: float = Field(2e-3, ge=0, description="largest of the schedule")
    beta1: Decay = Field(0.8, description="of AdamW")
    beta2: Decay = Field(0.99, description="of AdamW")


class EncoderSize(Config):
    """Sizes of a new speech tokenizer."""

    width: int = Field(160, ge=2, description="of the encoder")
    layers: int = Field(2, ge=1, description="of the encoder, below the codes")
    heads: int = Field(4, ge=1, description="attention heads")
    codes: int = Field(384, ge=2, description="size of the code book")
    block_frames: int = Field(
        200, ge=1, description="frames (20 ms) that attend to each other both ways (published)"
    )


class TokenizerTrainingConfig(CodecTrainingConfig):
    """The speech tokenizer: codes from which the text can be recognized."""

    title: ClassVar[str] = "Kimi-Audio's speech tokenizer, audio to codes"

    size: EncoderSize = Field(EncoderSize(), description="of new weights")
    upper_layers: int = Field(
        2, ge=1, description="of the recognizer above the codes, which is not kept"
    )
    max_seconds: float = Field(30.0, ge=0.1, le=30, description="longest recording in seconds")
    character_weight: Weight = Field(1.0, description="of CTC over characters at 50 Hz")
    word_weight: Weight = Field(0.0, description="of CTC over words at 12.5 Hz")
    phone_weight: Weight = Field(
        0.0, description="of cross-entropy over phones at 50 Hz, for data with phone times"
    )
    mel_weight: Weight = Field(1.0, description="of the L1 of the rebuilt spectrogram")
    commitment: Weight = Field(0.25, description="weight of the distance to the codes")
    quantize_from: float = Field(
        0.3, ge=0, le=0.95, description="share of the steps after which codes replace the vectors"
    )
    code_decay: Decay = Field(0.99, description="of the running means in the code book")
    dead_below: Share = Field(
        0.05, description="codes chosen this much less often than the average are placed anew"
    )

    @model_validator(mode="after")
    def _agrees(self) -> TokenizerTrainingConfig:
        if not (self.character_weight or self.word_weight or self.phone_weight):
            raise ValueError(
                "character_weight: 0, and so are word_weight and phone_weight; nothing to recognize"
            )
        if self.size.width % self.size.heads:
            raise ValueError("size.width: must be a multiple of size.heads")
        return self
