"""Settings of the training of the codec: detokenizer, vocoder, speech tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from kimia_infer.training.config import ConfigError, TrainingSettings, option


@dataclass(frozen=True, kw_only=True)
class CodecSettings(TrainingSettings):
    """What the training of every part of the codec has."""

    data: str = option("a directory of sounds, a list of paths, or JSONL with audio, text, codes")
    eval_data: str | None = option("evaluation data; without, the first sounds of data", None)
    eval_ratio: float = option(
        "sounds of data that are for evaluation, at least one; 0: none", 0.05, 0.0, 0.9
    )
    audio_root: str = option("relative audio paths begin here", ".")
    bad_lines: Literal["stop", "skip"] = option("what to do if sounds cannot be used", "stop")
    cache_hours: float = option("of sound kept decoded in memory, per reading process", 2.0, 0.0)
    initial: str | None = option(
        "folder of the part to begin with, whose sizes and statistics are kept; without, new "
        "weights of the sizes below",
        None,
    )
    learning_rate: float = option("largest of the schedule", 1e-3, 0.0)
    weight_decay: float = option("of matrices; biases and norms have none", 0.01, 0.0)
    batch_size: int = option("samples per forward pass", 8, 1)
    workers: int = option("processes that read data; 0: none", 0, 0)
    warmup_ratio: float = option("part of the steps over which the rate rises", 0.03, 0.0, 1.0)
    gradient_checkpointing: bool = option("recompute activations; less memory, slower", False)


@dataclass(frozen=True, kw_only=True)
class DiTSize:
    """Of a new velocity network."""

    width: int = option("hidden size", 192, 2)
    depth: int = option("blocks", 4, 1)
    heads: int = option("attention heads", 3, 1)
    mlp_ratio: int = option("feed-forward size / width", 4, 1)


@dataclass(frozen=True, kw_only=True)
class DetokenizerSettings(CodecSettings):
    """Flow matching: the velocity network from codes and noise to mel frames."""

    model: str = option(
        "checkpoint directory that has the speech tokenizer and the vocoder's config.json"
    )
    size: DiTSize = field(default_factory=DiTSize, metadata={"help": "of new weights"})
    crop_codes: int = option("longest piece of a sound in a sample, in codes", 40, 2)
    min_chunk: float = option("shortest chunk in seconds (published configuration)", 0.5, 0.08)
    max_chunk: float = option("longest chunk in seconds (published configuration)", 3.0, 0.08)
    look_ahead_codes: int = option("most codes that a chunk sees beyond its own", 12, 0)
    condition_dropout: float = option(
        "samples whose codes are dropped (published configuration: 0.2)", 0.1, 0.0, 1.0
    )
    average: float = option("decay of the average of weights that is written", 0.995, 0.0, 0.99999)

    def __post_init__(self) -> None:
        if self.max_chunk < self.min_chunk:
            raise ConfigError(f"max_chunk: {self.max_chunk} is less than min_chunk")
        if self.size.width % (2 * self.size.heads):
            raise ConfigError("size.width: must be an even multiple of size.heads")


@dataclass(frozen=True, kw_only=True)
class GeneratorSize:
    """Of a new vocoder; the product of the rates is the hop, 480 samples at 24 kHz."""

    channels: int = option("before the first stage; each stage halves them", 192, 2)
    rates: tuple[int, ...] = option("upsampling of each stage", (8, 5, 4, 3))
    kernels: tuple[int, ...] = option("of these", (16, 9, 8, 5))
    block_kernels: tuple[int, ...] = option("of the residual blocks of a stage", (3,))
    dilations: tuple[int, ...] = option("within a residual block", (1, 3, 5))
    mel_bins: int = option("bands of the mel spectrogram", 80, 1)
    fmin: float = option("lower edge of the mel spectrogram in Hz", 0.0, 0.0)
    fmax: float = option("upper edge of the mel spectrogram in Hz", 8000.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class VocoderSettings(CodecSettings):
    """The vocoder from mel frames to a wave."""

    size: GeneratorSize = field(default_factory=GeneratorSize, metadata={"help": "of new weights"})
    crop_frames: int = option("piece of a sound in a sample, in mel frames (20 ms)", 20, 8)
    anti_aliased_from: float = option(
        "part of the steps after which activations are anti-aliased, as they are served; before, "
        "steps are about three times faster",
        0.6,
        0.0,
        0.95,
    )
    mel_weight: float = option("of the L1 of the log-mel spectrogram", 1.0, 0.0)
    adversarial: float | None = option(
        "weight of the discriminators' losses; without, there are none", None, 1e-6
    )
    average: float = option("decay of the average of weights that is written", 0.995, 0.0, 0.99999)
    learning_rate: float = option("largest of the schedule", 2e-3, 0.0)
    beta1: float = option("of AdamW", 0.8, 0.0, 0.9999)
    beta2: float = option("of AdamW", 0.99, 0.0, 0.9999)


@dataclass(frozen=True, kw_only=True)
class EncoderSize:
    """Of a new speech tokenizer."""

    width: int = option("of the encoder", 160, 2)
    layers: int = option("of the encoder, below the codes", 2, 1)
    heads: int = option("attention heads", 4, 1)
    codes: int = option("size of the code book", 384, 2)
    block_frames: int = option("20 ms frames that see each other both ways (published)", 200, 1)


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings(CodecSettings):
    """The speech tokenizer: codes from which the text can be recognized."""

    size: EncoderSize = field(default_factory=EncoderSize, metadata={"help": "of new weights"})
    upper_layers: int = option("of the recognizer above the codes, which is not kept", 2, 1)
    max_seconds: float = option("longest sound", 30.0, 0.1, 30.0)
    character_weight: float = option("of CTC over characters at 50 Hz", 1.0, 0.0)
    word_weight: float = option("of CTC over words at 12.5 Hz", 0.0, 0.0)
    phone_weight: float = option(
        "of cross-entropy over phones at 50 Hz, for data that says when each begins", 0.0, 0.0
    )
    mel_weight: float = option("of the L1 of the rebuilt spectrogram", 1.0, 0.0)
    commitment: float = option("weight of the distance to the codes", 0.25, 0.0)
    quantize_from: float = option(
        "part of the steps after which codes replace the vectors", 0.3, 0.0, 0.95
    )
    code_decay: float = option("of the running means that are the code book", 0.99, 0.0, 0.9999)
    dead_below: float = option(
        "codes chosen this much less often than the average begin anew elsewhere", 0.05, 0.0, 1.0
    )

    def __post_init__(self) -> None:
        if not (self.character_weight or self.word_weight or self.phone_weight):
            raise ConfigError(
                "character_weight: 0, and so are word_weight and phone_weight; nothing to recognize"
            )
        if self.size.width % self.size.heads:
            raise ConfigError("size.width: must be a multiple of size.heads")


PARTS: dict[str, type[CodecSettings]] = {
    "detokenizer": DetokenizerSettings,
    "vocoder": VocoderSettings,
    "tokenizer": TokenizerSettings,
}
"""The parts that can be trained, by their names on the command line."""
