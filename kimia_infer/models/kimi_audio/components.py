"""The components stored in a checkpoint directory: where each lies and how it is served."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from kimia_infer.models.kimi_audio.checkpoint import (
    DETOKENIZER_FOLDER,
    SPEECH_TOKENIZER_FOLDER,
    TUNED_WHISPER,
    VOCODER_FOLDER,
    WHISPER_FOLDER,
)
from kimia_infer.models.kimi_audio.config import DiTConfig, LanguageModelConfig
from kimia_infer.models.kimi_audio.dit import dit_component
from kimia_infer.models.kimi_audio.language_model import language_model_component
from kimia_infer.models.kimi_audio.speech_tokenizer import speech_tokenizer_component
from kimia_infer.models.kimi_audio.text_tokenizer import TextTokenizer
from kimia_infer.models.kimi_audio.vocoder import vocoder_component
from kimia_infer.models.kimi_audio.whisper import whisper_component
from kimia_infer.utils.errors import CheckpointError
from kimia_infer.weights.component import Component


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


def understanding_components(directory: Path, quantized: bool = False) -> dict[str, Component]:
    """``language_model`` and ``whisper``, the encoder that feeds it.

    An encoder that was fine-tuned is stored with the language model; it replaces the one in
    the Whisper folder. ``quantized`` says whether a quantized language model is accepted.
    Raises CheckpointError.
    """
    model = language_model_component(directory, quantized)
    has = any(name.startswith(TUNED_WHISPER) for name in model.store.tensors)
    tuned = model.store.under(TUNED_WHISPER) if has else None
    whisper = whisper_component(directory / WHISPER_FOLDER, tuned)
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
    speech_tokenizer = speech_tokenizer_component(directory / SPEECH_TOKENIZER_FOLDER)
    components = StoredComponents(
        StoredComponent(speech_tokenizer, SPEECH_TOKENIZER_FOLDER, exact=True),
        StoredComponent(found["whisper"], WHISPER_FOLDER, "model.encoder."),
        StoredComponent(found["language_model"], ""),
    )
    if not detokenizer:
        return components
    dit = dit_component(directory / DETOKENIZER_FOLDER)
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
