"""All stages of a checkpoint, checked together and then loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from kimia_infer.api.memory import MemoryPlan, free_memory, weight_bytes
from kimia_infer.api.offloading import offloaded
from kimia_infer.api.transcription import longest_segment
from kimia_infer.audio.split import LONGEST_SECONDS
from kimia_infer.layers.quantization import (
    check_quantization,
    quantized_part,
    stored_scheme,
)
from kimia_infer.models.kimi_audio.components import StoredPart, checkpoint_parts
from kimia_infer.models.kimi_audio.config import LanguageModelConfig
from kimia_infer.models.kimi_audio.detokenizer import Detokenizer
from kimia_infer.models.kimi_audio.dit import DiTConfig
from kimia_infer.models.kimi_audio.language_model import LanguageModel
from kimia_infer.models.kimi_audio.layout import WHISPER_FOLDER
from kimia_infer.models.kimi_audio.published import (
    DETOKENIZER_FOLDER,
    SPEECH_TOKENIZER_FOLDER,
    VOCODER_FOLDER,
)
from kimia_infer.models.kimi_audio.speech_tokenizer import SpeechCodes
from kimia_infer.models.kimi_audio.text_tokenizer import TextTokenizer
from kimia_infer.models.kimi_audio.whisper import WhisperFeatures
from kimia_infer.utils.errors import CheckpointError, RequestError
from kimia_infer.weights.adapter import Adapter
from kimia_infer.weights.manifest import MANIFEST_NAME, read_manifest
from kimia_infer.weights.parallel import load_parts
from kimia_infer.weights.tensors import StoredTensor


@dataclass
class Stages:
    """The loaded stages in the order a request meets them; no detokenizer, no speech.

    ``vocoder_folder`` has the ``config.json`` that reference voices are read by, None without.
    ``adapter`` is the directory of the adapter that is part of the weights, None without.
    ``offload`` names what waits in host memory, None for nothing.
    Recordings are transcribed in segments of at most ``segment_seconds``.
    """

    text_tokenizer: TextTokenizer
    speech_codes: SpeechCodes
    whisper_features: WhisperFeatures
    language_model: LanguageModel
    detokenizer: Detokenizer | None
    vocoder_folder: Path | None = None
    adapter: Path | None = None
    segment_seconds: float = LONGEST_SECONDS
    offload: str | None = None


def load_stages(
    directory: Path,
    detokenizer: bool,
    device: torch.device,
    dtype: torch.dtype,
    adapter: Path | None = None,
    quantization: str | None = None,
    kv_cache: str | None = None,
    offload: str | None = None,
) -> Stages:
    """Load a checkpoint directory to ``device`` with a progress bar.

    The speech tokenizer stays in float32, since bfloat16 changes codes. A slim checkpoint is
    verified by its manifest: files that changed size, configurations and headers before any
    weight is read, every tensor while it is read. ``adapter`` is the directory of an adapter that
    is added to the weights. ``quantization`` is one of ``SCHEMES``, None as they are stored.
    ``kv_cache``, one of ``KV_CACHES``, is what requests will have; None for "none". With
    ``offload="encoders"`` speech tokenizer and Whisper encoder stay in host memory, from which
    they come to the device for each sound.

    Raises:
        CheckpointError: the first thing that does not fit.
        RequestError: the quantization cannot be used here, or the device has too little memory.
    """
    scheme = choose_scheme(directory, quantization, adapter)
    check_quantization(scheme, device, stored_scheme(directory))
    change = Adapter.read(adapter) if adapter is not None else None
    slim = read_manifest(directory / MANIFEST_NAME)
    if slim is not None:
        slim.check(directory, detokenizer)
    segment_seconds = longest_segment(directory)
    text_tokenizer = TextTokenizer(directory)
    check_vocabulary(text_tokenizer, LanguageModelConfig.from_directory(directory), directory)
    parts = checkpoint_parts(directory, detokenizer, quantized=True)
    if detokenizer:
        check_codes(LanguageModelConfig.from_directory(directory), directory)
    free = free_memory(device)
    if free is not None:
        plan = memory_plan(directory, parts, dtype, kv_cache or "none", offload is not None)
        plan.check(scheme, detokenizer, device, free)
    if change is not None:
        _adapt(parts, change)
    if scheme != stored_scheme(directory):
        parts[2] = replace(parts[2], part=quantized_part(parts[2].part, scheme))
    checksum = partial(slim.checksum, directory) if slim is not None else None
    speech, encoder, language_model, *speaking = _load(parts, device, dtype, checksum, offload)
    codes = SpeechCodes(speech, directory / SPEECH_TOKENIZER_FOLDER)
    features = WhisperFeatures(encoder, directory / WHISPER_FOLDER)
    if offload is not None:
        codes, features = offloaded(codes, features, device)
    return Stages(
        text_tokenizer,
        codes,
        features,
        language_model,
        Detokenizer(*speaking) if speaking else None,
        directory / VOCODER_FOLDER if speaking else None,
        adapter,
        segment_seconds,
        offload,
    )


def _adapt(parts: list[StoredPart], change: Adapter) -> None:
    """Let the Whisper encoder and the language model be read with the adapter added to them."""
    _, whisper, model, *_ = (entry.part for entry in parts)
    adapted = change.adapted({"language_model": model, "whisper": whisper})
    parts[1] = replace(parts[1], part=adapted["whisper"])
    parts[2] = replace(parts[2], part=adapted["language_model"])


def _load(
    parts: Sequence[StoredPart],
    device: torch.device,
    dtype: torch.dtype,
    checksum: Callable[[StoredTensor], int] | None,
    offload: str | None,
) -> list[nn.Module]:
    """The modules of all parts, both encoders in host memory if they are offloaded."""
    served = [(entry.part, entry.served(dtype)) for entry in parts]
    groups = [(served, device)]
    if offload is not None:
        groups = [(served[:2], torch.device("cpu")), (served[2:], device)]
    total = sum(entry.part.elements for entry in parts)
    with tqdm(total=total, desc="Loading weights", unit=" values", unit_scale=True) as bar:
        return [
            module
            for group, place in groups
            for module in load_parts(group, place, bar.update, checksum)
        ]


def memory_plan(
    directory: Path,
    parts: Sequence[StoredPart],
    dtype: torch.dtype,
    kv_cache: str,
    offload: bool,
) -> MemoryPlan:
    """What the :func:`checkpoint_parts` of a directory will take in memory."""
    with torch.device("meta"):
        sizes = [weight_bytes(entry.part.build(), entry.served(dtype)) for entry in parts]
    config = LanguageModelConfig.from_directory(directory)
    stored = stored_scheme(directory)
    return MemoryPlan(config, dtype, kv_cache, tuple(sizes[:2]), sum(sizes[3:]), offload, stored)


def choose_scheme(directory: Path, asked: str | None, adapter: Path | None) -> str:
    """How the language model is quantized; ``asked`` is None where it does not matter.

    Raises:
        CheckpointError: the weights are quantized already, and not so; or there is an adapter,
            which cannot be added to them.
    """
    stored = stored_scheme(directory)
    if stored == "none":
        return asked or stored
    if asked not in (None, stored):
        raise CheckpointError(
            f"{directory}: the weights are quantized ({stored}), but {asked!r} is asked for; leave "
            "that out, or use the checkpoint that they were made from"
        )
    if adapter is not None:
        raise CheckpointError(
            f"{directory}: an adapter cannot be added to weights that are quantized ({stored}); "
            f"use the checkpoint that they were made from, with quantization {stored!r}"
        )
    return stored


def check_vocabulary(
    tokenizer: TextTokenizer, config: LanguageModelConfig, directory: Path
) -> None:
    """Raise CheckpointError unless tokenizer and model agree on where audio ids begin."""
    if (tokenizer.base_tokens, tokenizer.vocab_size) != (config.base_tokens, config.token_offset):
        raise CheckpointError(
            f"{directory}: tiktoken.model holds {tokenizer.base_tokens} tokens and "
            f"{tokenizer.vocab_size} with the special ones, but config.json says num_base_tokens "
            f"{config.base_tokens} and kimia_token_offset {config.token_offset}; use files of the "
            "same checkpoint"
        )


def check_codes(config: LanguageModelConfig, directory: Path) -> None:
    """Raise CheckpointError unless the detokenizer knows every code that the model can say."""
    codes, path = config.vocab_size - config.token_offset, directory / DETOKENIZER_FOLDER
    known = DiTConfig.from_directory(path).codes
    if codes > known:
        raise CheckpointError(
            f"{path / 'config.yaml'}: semantic_vocab_size is {known}, but the language model has "
            f"{codes} speech codes; use files of the same checkpoint"
        )


def default_device() -> torch.device:
    """The accelerator PyTorch reports, else the CPU; MPS has to be named explicitly."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or accelerator.type == "mps":
        return torch.device("cpu")
    return accelerator


def parse_dtype(value: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """A dtype by value or name; None is float32 on the CPU and bfloat16 elsewhere."""
    if value is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    if dtype not in (torch.float32, torch.bfloat16):
        raise RequestError(f"dtype: expected 'float32' or 'bfloat16', found {value!r}")
    return dtype
