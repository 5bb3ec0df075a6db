"""The language model of the miniature: from the small world to a checkpoint that can be served.

The stages in their order, each of which leaves a folder: the Whisper encoder, the checkpoint with
both trained encoders and an untrained language model, the conversations with their speech codes,
the trained language model, and the whole miniature.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kimia_infer.api.transcription import SEGMENT_FIELD
from kimia_infer.language_model.config import LanguageModelConfig
from kimia_infer.language_model.model import language_model_slots
from kimia_infer.training.checkpoints import all_checkpoints
from kimia_infer.training.config import FinetuneSettings
from kimia_infer.training.finetune import finetune
from kimia_infer.training.miniature.spoken_world import READ, REPEAT, TRANSCRIBE
from kimia_infer.training.miniature.untrained import Sizes, write_miniature
from kimia_infer.training.miniature.whisper_encoder import WhisperSettings, train_whisper
from kimia_infer.training.miniature.world import vocabulary
from kimia_infer.training.trainer import Outcome
from kimia_infer.weights.checkpoint import manifest, read_json
from kimia_infer.weights.layout import WHISPER_FOLDER
from kimia_infer.weights.published import SPEECH_TOKENIZER_FOLDER

MERGES = 320
"""Merges of the text tokenizer: every word of the world is a token."""

SIZE = {
    "hidden": 192,
    "feed_forward": 384,
    "trunk_layers": 6,
    "fork_layer": 3,
    "mimo_layers": 2,
    "heads": 6,
    "kv_heads": 2,
}
SEGMENT_SECONDS = 3
"""Of what is transcribed at a time: a sentence. It has learned little of several in a row."""

EMBEDDING_SCALE = 0.3
"""Deviation of untrained embeddings and gain of the adapted features that are added to them."""


def train_whisper_encoder(world: Path, output: Path, **settings: object) -> Outcome:
    """Train the encoder on all sounds of users; ``output/final`` holds its folder."""
    values = {
        "data": str(world / "speech_train.jsonl"),
        "eval_data": str(world / "speech_validation.jsonl"),
        "audio_root": str(world),
        "output": str(output),
        "max_steps": 2500,
        "batch_size": 16,
        "learning_rate": 2e-3,
        "precision": "bf16",
        "cache_hours": 8.0,
        "full_from": 0.85,
        "eval_every": 500,
        "save_every": 500,
    }
    return train_whisper(WhisperSettings(**(values | settings)), _begun(output))


def write_base(target: Path, speech_tokenizer: Path, whisper: Path, seed: int = 1) -> None:
    """Write a whole checkpoint whose two encoders are trained and whose language model is not.

    ``speech_tokenizer`` and ``whisper`` are the folders of these parts.
    """
    codes = read_json(speech_tokenizer / "config.json")["quantize_vocab_size"]
    width = read_json(whisper / "config.json")["d_model"]
    sizes = Sizes(merges=MERGES, codes=codes, whisper_width=width, **SIZE)
    write_miniature(target, seed, sizes, corpus())
    _put(speech_tokenizer, target / SPEECH_TOKENIZER_FOLDER)
    _put(whisper, target / WHISPER_FOLDER)
    _cast(target / WHISPER_FOLDER / "model.safetensors", torch.float16)
    generation = target / "generation_config.json"
    values = read_json(generation) | {SEGMENT_FIELD: SEGMENT_SECONDS}
    generation.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    config = LanguageModelConfig.from_directory(target)
    _write_tensors(
        target / "model.safetensors", untrained_language_model(config, seed), torch.bfloat16
    )


def corpus() -> str:
    """What the text tokenizer is made for: every word, at a beginning and after a space."""
    words = vocabulary()
    repeated = (f"{word} {word} {word}" for word in words)
    return "\n".join([*words, *repeated, *TRANSCRIBE, REPEAT, READ])


def untrained_language_model(config: LanguageModelConfig, seed: int) -> dict[str, Tensor]:
    """Random tensors by published names, fit to be trained.

    Normal values whose deviation is 1 / sqrt(fan-in), smaller for what is added to the residual
    stream; norms are one and biases zero.
    """
    generator = torch.Generator().manual_seed(seed)
    depth = 1 / math.sqrt(2 * (config.trunk_layers + config.mimo_layers))
    tensors = {}
    for name, shape in sorted(manifest(language_model_slots(config)).items()):
        if len(shape) == 1:
            gain = EMBEDDING_SCALE if "vq_adaptor" in name else 1.0
            tensors[name] = torch.zeros(shape) if name.endswith("bias") else torch.full(shape, gain)
            continue
        scale = 1 / math.sqrt(shape[1])
        if "embed_tokens" in name:
            scale = EMBEDDING_SCALE
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            scale *= depth
        tensors[name] = scale * torch.randn(shape, generator=generator)
    return tensors


def train_language_model(
    base: Path, conversations: Path, output: Path, **settings: object
) -> Outcome:
    """Train the language model; ``output/final`` is a whole checkpoint."""
    values = {
        "model": str(base),
        "data": str(conversations / "train.jsonl"),
        "eval_data": str(conversations / "validation.jsonl"),
        "output": str(output),
        "feature_cache": str(conversations / "features"),
        "parts": ("embedding", "trunk", "mimo", "adaptor", "heads"),
        "spoken_answers": True,
        "group_by_length": True,
        "gradient_checkpointing": False,
        "precision": "bf16",
        "workers": 0,
        "batch_size": 24,
        "max_steps": 7000,
        "learning_rate": 2e-3,
        "warmup_ratio": 0.03,
        "weight_decay": 0.05,
        "feature_dropout": 0.01,
        "code_dropout": 0.01,
        "eval_every": 500,
        "save_every": 250,
        "keep_checkpoints": 1,
    }
    return finetune(FinetuneSettings(**(values | settings)), _begun(output))


def assemble(language_model: Path, detokenizer: Path, vocoder: Path, target: Path) -> None:
    """Put the miniature together.

    ``language_model`` is the whole checkpoint that its training gave; ``detokenizer`` and
    ``vocoder`` are the folders of these parts, stored in half precision.
    """
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(language_model, part)
    for source, name in ((detokenizer, "audio_detokenizer"), (vocoder, "vocoder")):
        _put(source, part / name)
        _cast(part / name / "model.safetensors", torch.float16)
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)


def _begun(output: Path) -> bool:
    """Whether there is a checkpoint to continue from."""
    return bool(all_checkpoints(output))


def _put(source: Path, target: Path) -> None:
    """The files of a trained part in place of untrained ones; what it has no file for is kept."""
    shutil.copytree(source, target, dirs_exist_ok=True)


def _cast(path: Path, dtype: torch.dtype) -> None:
    _write_tensors(path, load_file(path), dtype)


def _write_tensors(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    path.unlink()  # it may be a link to the file of another folder
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # the library makes it readable by its owner only
