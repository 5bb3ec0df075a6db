"""The components stored in a checkpoint directory: where each lies and how it is served.

Those of the encoders are here; the others stand beside their networks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kimia_infer.models.kimi_audio.checkpoint import (
    DETOKENIZER_FOLDER,
    SPEECH_TOKENIZER_FOLDER,
    TUNED_WHISPER,
    VOCODER_FOLDER,
    WHISPER_FOLDER,
)
from kimia_infer.models.kimi_audio.config import (
    DiTConfig,
    LanguageModelConfig,
    SpeechTokenizerConfig,
    encoder_config,
)
from kimia_infer.models.kimi_audio.dit import dit_component
from kimia_infer.models.kimi_audio.encoders import SpeechTokenizer, feature_extractor
from kimia_infer.models.kimi_audio.language_model import language_model_component
from kimia_infer.models.kimi_audio.packing import is_packed, mapped_part, served_language_model
from kimia_infer.models.kimi_audio.text_tokenizer import TextTokenizer
from kimia_infer.models.kimi_audio.vocoder import vocoder_component
from kimia_infer.utils.errors import CheckpointError
from kimia_infer.weights.component import Component, Slot, identity_slots, read_json
from kimia_infer.weights.tensors import TensorStore, open_directory

if TYPE_CHECKING:  # importing transformers takes seconds, so it waits until an encoder is built
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder


@dataclass(frozen=True)
class StoredComponent:
    """A component, its folder ("" for the directory itself) and its published name prefix.

    ``exact`` marks the speech tokenizer: in bfloat16 it would give other codes, so it is
    stored and served in float32 whatever the dtype of the rest.
    """

    component: Component
    folder: str
    prefix: str = ""
    exact: bool = False

    def served(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of this component where the model is served in ``dtype``."""
        return torch.float32 if self.exact else dtype


@dataclass(frozen=True)
class StoredComponents:
    """The components of a checkpoint directory; ``dit`` and ``vocoder`` are for speech only."""

    speech_tokenizer: StoredComponent
    whisper: StoredComponent
    language_model: StoredComponent
    dit: StoredComponent | None = None
    vocoder: StoredComponent | None = None

    def items(self) -> Iterator[tuple[str, StoredComponent]]:
        """Names and components, without those that are None."""
        for field in fields(self):
            stored = getattr(self, field.name)
            if stored is not None:
                yield field.name, stored

    def changed(self, **components: Component) -> StoredComponents:
        """A copy in which the named components are replaced."""
        return replace(
            self,
            **{name: replace(getattr(self, name), component=c) for name, c in components.items()},
        )


def speech_tokenizer_slots(config: SpeechTokenizerConfig) -> list[Slot]:
    """Every tensor of the tokenizer by its published name, without prefix."""
    with torch.device("meta"):
        return identity_slots(SpeechTokenizer(config))


def speech_tokenizer_component(directory: Path, packed: bool = False) -> Component[SpeechTokenizer]:
    """The speech tokenizer of a checkpoint folder, which may be ``packed`` for a CPU.

    Tensors may be named without prefix or ``model.encoder.*``. What training and the upper
    layers left there (``ema_count``, ``embed_positions2``, further layers) is ignored.

    Raises:
        CheckpointError: a file or tensor is missing, damaged or of the wrong shape, or the
            configuration selects a network other than the published one.
    """
    path = directory / "config.json"
    config = SpeechTokenizerConfig.from_json(read_json(path), path)
    feature_extractor(directory, config.encoder.num_mel_bins)  # refuses a bad folder early
    build, slots = lambda: SpeechTokenizer(config), speech_tokenizer_slots(config)
    if packed:
        build, slots = mapped_part("speech_tokenizer", build, slots)
    return Component(
        name="speech tokenizer",
        build=build,
        slots=slots,
        store=open_directory(directory).under("model.encoder.", ""),
    )


def whisper_slots(config: WhisperConfig) -> list[Slot]:
    """Every tensor of the encoder, by its published name without ``model.encoder.``."""
    with torch.device("meta"):
        return identity_slots(_whisper(config))


def _whisper(config: WhisperConfig) -> WhisperEncoder:
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    return WhisperEncoder(config)


def whisper_component(
    directory: Path, tuned: TensorStore | None = None, packed: bool = False
) -> Component[WhisperEncoder]:
    """The Whisper encoder of a checkpoint folder, which may be ``packed``; its decoder is ignored.

    Tensors may be named ``model.encoder.*``, as published, or ``encoder.*``, as exported
    after fine-tuning. ``tuned`` holds those of an encoder that was fine-tuned with the language
    model, which are then used; the folder need not exist. Without a ``config.json`` its
    sizes are taken from the tensors.

    Raises:
        CheckpointError: a file or tensor is missing, damaged or of the wrong shape.
    """
    path = directory / "config.json"
    store = tuned or open_directory(directory).under("model.encoder.", "encoder.")
    values = read_json(path) if path.is_file() else _whisper_sizes(store, path)
    config = encoder_config(values, path)
    feature_extractor(directory, config.num_mel_bins)  # refuses a bad folder before loading
    build, slots = lambda: _whisper(config), whisper_slots(config)
    if packed:
        build, slots = mapped_part("whisper", build, slots)
    return Component(
        name="Whisper encoder",
        build=build,
        slots=slots,
        store=store,
    )


def _whisper_sizes(store: TensorStore, missing: Path) -> dict[str, int]:
    """Sizes that the tensors imply; heads have 64 dimensions, as in all published encoders."""
    shapes = {name: stored.shape for name, stored in store.tensors.items()}
    try:
        width, mels, _ = shapes["conv1.weight"]
        inner, _ = shapes["layers.0.fc1.weight"]
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{store.location}: not a Whisper encoder ({error})") from error
    if width % 64:
        raise CheckpointError(
            f"{missing}: file missing, and a width of {width} leaves the number of heads open"
        )
    layers = {name.split(".")[1] for name in shapes if name.startswith("layers.")}
    return {
        "d_model": width,
        "encoder_layers": len(layers),
        "encoder_attention_heads": width // 64,
        "encoder_ffn_dim": inner,
        "num_mel_bins": mels,
    }


def understanding_components(directory: Path, quantized: bool = False) -> dict[str, Component]:
    """``language_model`` and ``whisper``, the encoder that feeds it.

    An encoder that was fine-tuned is stored with the language model; it replaces the one in
    the Whisper folder. ``quantized`` says whether a quantized language model is accepted.
    Raises CheckpointError.
    """
    model = served_language_model(directory) if quantized else language_model_component(directory)
    has = any(name.startswith(TUNED_WHISPER) for name in model.store.tensors)
    tuned = model.store.under(TUNED_WHISPER) if has else None
    whisper = whisper_component(directory / WHISPER_FOLDER, tuned, is_packed(directory))
    return {"language_model": model, "whisper": whisper}


def checkpoint_components(
    directory: Path, detokenizer: bool = True, quantized: bool = False
) -> StoredComponents:
    """All components of a checkpoint, those of the detokenizer if asked for.

    Raises:
        CheckpointError: a file or tensor is missing, damaged or of the wrong shape, the
            detokenizer knows fewer speech codes than the language model has, or the language
            model is quantized and ``quantized`` is false.
    """
    found = understanding_components(directory, quantized)
    packed = is_packed(directory)
    speech_tokenizer = speech_tokenizer_component(directory / SPEECH_TOKENIZER_FOLDER, packed)
    components = StoredComponents(
        StoredComponent(speech_tokenizer, SPEECH_TOKENIZER_FOLDER, exact=True),
        StoredComponent(found["whisper"], WHISPER_FOLDER, "model.encoder."),
        StoredComponent(found["language_model"], ""),
    )
    if not detokenizer:
        return components
    dit = dit_component(directory / DETOKENIZER_FOLDER, packed)
    vocoder = vocoder_component(directory / VOCODER_FOLDER)
    _check_codes(directory)
    return replace(
        components,
        dit=StoredComponent(dit, DETOKENIZER_FOLDER, "speech_model."),
        vocoder=StoredComponent(vocoder, VOCODER_FOLDER),
    )


def checked_text_tokenizer(directory: Path) -> TextTokenizer:
    """The text tokenizer of a checkpoint directory.

    Raises:
        CheckpointError: it cannot be read, or audio ids do not begin where config.json says.
    """
    tokenizer = TextTokenizer(directory)
    config = LanguageModelConfig.from_directory(directory)
    if (tokenizer.base_tokens, tokenizer.vocab_size) != (config.base_tokens, config.token_offset):
        raise CheckpointError(
            f"{directory}: tiktoken.model holds {tokenizer.base_tokens} tokens and "
            f"{tokenizer.vocab_size} with the special ones, but config.json says num_base_tokens "
            f"{config.base_tokens} and kimia_token_offset {config.token_offset}; use files of the "
            "same checkpoint"
        )
    return tokenizer


def _check_codes(directory: Path) -> None:
    """Raise CheckpointError unless the detokenizer knows every code of the language model."""
    config, path = LanguageModelConfig.from_directory(directory), directory / DETOKENIZER_FOLDER
    codes, known = config.vocab_size - config.token_offset, DiTConfig.from_directory(path).codes
    if codes > known:
        raise CheckpointError(
            f"{path / 'config.yaml'}: semantic_vocab_size is {known}, but the language model has "
            f"{codes} speech codes; use files of the same checkpoint"
        )
