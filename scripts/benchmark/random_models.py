"""Models with random weights, created on their device: no checkpoint is read or written."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from kimia_infer.api.loading import Components
from kimia_infer.layers.quantization import quantize_model
from kimia_infer.models.kimi_audio.detokenizer import Detokenizer
from kimia_infer.models.kimi_audio.dit import DiT
from kimia_infer.models.kimi_audio.encoders import SpeechCodes, SpeechTokenizer, WhisperFeatures
from kimia_infer.models.kimi_audio.language_model import LanguageModel
from kimia_infer.models.kimi_audio.text_tokenizer import SpecialTokens
from kimia_infer.models.kimi_audio.vocoder import Vocoder
from scripts.benchmark.sizes import Sizes

NO_FOLDER = Path(os.devnull)
"""Has no preprocessor_config.json, so that spectrograms are the published ones."""

Module = TypeVar("Module", bound=nn.Module)


class NumberTokenizer:
    """Replaces the text tokenizer: encodes code points of characters, decodes ids as numbers."""

    def __init__(self, base_tokens: int):
        self.base_tokens = base_tokens
        self.special = SpecialTokens.after(base_tokens)

    def encode(self, text: str) -> list[int]:
        return [ord(character) % self.base_tokens for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(f"{token} " for token in ids)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return self.decode(ids).encode()


def random_module(build: Callable[[], Module], device: torch.device, dtype: torch.dtype) -> Module:
    """A module with random weights that keep activations near 1 in size.

    Matrices have the variance 1 / fan-in, norm weights are one, biases and the parameters of
    vocoders' activations zero.
    """
    with torch.device("meta"):
        module = build()
    module = module.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            deviation = (len(parameter) / parameter.numel()) ** 0.5
            parameter.normal_(0, deviation, generator=generator)
        else:
            parameter.fill_(1 if name.endswith("weight") else 0)
    return module


def random_language_model(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> LanguageModel:
    """Never generates special tokens, such as those that end an answer: their logits are 0."""
    model = random_module(lambda: LanguageModel(sizes.language_model), device, dtype)
    special = slice(model.config.base_tokens, model.config.token_offset)
    for head in (model.text_head, model.audio_head):
        head.weight[special] = 0
    return model


def random_components(
    sizes: Sizes,
    device: torch.device,
    dtype: torch.dtype,
    quantization: str = "none",
    language_model: LanguageModel | None = None,
) -> Components:
    """The components of :class:`KimiAudio`; the speech tokenizer in float32."""
    language_model = language_model or random_language_model(sizes, device, dtype)
    speech = random_module(lambda: SpeechTokenizer(sizes.speech_tokenizer), device, torch.float32)
    whisper = random_module(lambda: WhisperEncoder(sizes.whisper), device, dtype)
    detokenizer = Detokenizer(
        random_module(lambda: DiT(sizes.dit), device, dtype),
        random_module(lambda: Vocoder(sizes.vocoder), device, dtype),
    )
    return Components(
        NumberTokenizer(sizes.language_model.base_tokens),
        SpeechCodes(speech, NO_FOLDER),
        WhisperFeatures(whisper, NO_FOLDER),
        quantize_model(language_model, quantization),
        detokenizer,
    )
