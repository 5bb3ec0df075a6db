"""How each stage of the miniature is made, with the settings of all trainings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from kimia_infer.models.kimi_audio.checkpoint import (
    DETOKENIZER_FOLDER,
    SPEECH_TOKENIZER_FOLDER,
    VOCODER_FOLDER,
    WHISPER_FOLDER,
)
from kimia_infer.training.config import FinetuneConfig
from kimia_infer.training.run_directory import FINAL, TrainingError, all_checkpoints
from kimia_infer.training.tasks.config import (
    CodecTrainingConfig,
    DetokenizerTrainingConfig,
    DiTSize,
    EncoderSize,
    GeneratorSize,
    TokenizerTrainingConfig,
    VocoderTrainingConfig,
)
from kimia_infer.training.tasks.detokenizer import train_detokenizer
from kimia_infer.training.tasks.finetune import finetune
from kimia_infer.training.tasks.speech_tokenizer import train_tokenizer
from kimia_infer.training.tasks.vocoder import new_config, train_vocoder
from kimia_infer.training.trainer import TrainingResult
from kimia_infer.utils.files import replacing_directory, write_text
from scripts.miniature.assembly import assemble, write_base
from scripts.miniature.conversations import write_conversations
from scripts.miniature.figures import write_figures
from scripts.miniature.spoken_world import WorldSize, write_world
from scripts.miniature.whisper_encoder import WhisperTrainingConfig, train_whisper

WORLD = WorldSize()
MEASURED = 100
"""Cases of each kind for the figures."""

VOCODER = {
    "size": GeneratorSize(channels=160),
    "batch_size": 8,
    "max_steps": 1800,
    "anti_aliased_from": 0.75,
    "eval_ratio": 0.02,
    "average": 0.99,
    "eval_every": 300,
    "save_every": 300,
    "seed": 1,
}
TOKENIZER = {
    "size": EncoderSize(width=160, layers=2, heads=4, codes=512),
    "batch_size": 16,
    "max_steps": 2400,
    "learning_rate": 1.5e-3,
    "character_weight": 0.0,
    "word_weight": 0.3,
    "phone_weight": 1.0,
    "mel_weight": 0.3,
    "quantize_from": 0.15,
    "cache_hours": 8.0,
    "eval_every": 500,
    "save_every": 500,
    "seed": 1,
}
DETOKENIZER = {
    "size": DiTSize(width=192, depth=4, heads=3),
    "batch_size": 8,
    "max_steps": 4000,
    "crop_codes": 24,
    "learning_rate": 1.5e-3,
    "condition_dropout": 0.05,
    "precision": "bf16",
    "eval_ratio": 0.02,
    "eval_every": 500,
    "save_every": 500,
    "seed": 1,
}
WHISPER = {
    "max_steps": 2500,
    "batch_size": 16,
    "learning_rate": 2e-3,
    "precision": "bf16",
    "cache_hours": 8.0,
    "full_from": 0.85,
    "eval_every": 500,
    "save_every": 500,
}
LANGUAGE_MODEL = {
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
"""Settings of the trainings."""


def make_world(run: Path) -> None:
    """Raises ConfigurationError if espeak-ng is missing."""
    with replacing_directory(run / "world") as folder:
        write_world(folder, WORLD)


def make_vocoder(run: Path) -> None:
    place = _place(run, "vocoder", run / "world" / "answers_train.jsonl")
    _train(train_vocoder, VocoderTrainingConfig(**place, **VOCODER))


def make_tokenizer(run: Path) -> None:
    _train(train_tokenizer, TokenizerTrainingConfig(**_speech(run, "tokenizer"), **TOKENIZER))


def make_whisper(run: Path) -> None:
    _train(train_whisper, WhisperTrainingConfig(**_speech(run, "whisper"), **WHISPER))


def make_encoder(run: Path) -> None:
    """Round the tokenizer to half precision, so that codes come from the stored weights."""
    source = run / "tokenizer" / FINAL / SPEECH_TOKENIZER_FOLDER
    # The moving averages of the code book are for training only.
    tensors = {
        name: tensor.half()
        for name, tensor in load_file(source / "model.safetensors").items()
        if not name.startswith("ema_")
    }
    # The detokenizer's training reads the vocoder's spectrogram settings.
    vocoder = new_config(VocoderTrainingConfig(data="", output="", **VOCODER))
    with replacing_directory(run / "encoder") as target:
        folder = target / SPEECH_TOKENIZER_FOLDER
        folder.mkdir()
        shutil.copyfile(source / "config.json", folder / "config.json")
        save_file(tensors, folder / "model.safetensors")
        write_text(target / VOCODER_FOLDER / "config.json", json.dumps(vocoder, indent=1) + "\n")


def make_detokenizer(run: Path) -> None:
    place = _place(run, "detokenizer", run / "world" / "voice_train.jsonl")
    settings = DetokenizerTrainingConfig(**place, model=str(run / "encoder"), **DETOKENIZER)
    _train(train_detokenizer, settings)


def make_base(run: Path) -> None:
    whisper = run / "whisper" / FINAL / WHISPER_FOLDER
    with replacing_directory(run / "base") as folder:
        write_base(folder, run / "encoder" / SPEECH_TOKENIZER_FOLDER, whisper)


def make_conversations(run: Path) -> None:
    """In place, since the lists contain absolute paths; train.jsonl is written last."""
    write_conversations(run / "world", run / "base", run / "conversations")


def make_language_model(run: Path) -> None:
    lists = run / "conversations"
    place = _place(run, "language_model", lists / "train.jsonl", lists / "validation.jsonl")
    place |= {"model": str(run / "base"), "feature_cache": str(lists / "features")}
    _train(finetune, FinetuneConfig(**place, **LANGUAGE_MODEL))


def make_mini(run: Path) -> None:
    assemble(
        run / "language_model" / FINAL,
        run / "detokenizer" / FINAL / DETOKENIZER_FOLDER,
        run / "vocoder" / FINAL / VOCODER_FOLDER,
        run / "mini",
    )


def make_figures(run: Path) -> None:
    with replacing_directory(run / "figures") as folder:
        write_figures(run / "mini", run / "world", folder, MEASURED)


def _place(run: Path, name: str, data: Path, eval_data: Path | None = None) -> dict[str, str]:
    """Where a training reads and writes."""
    place = {"output": run / name, "data": data, "audio_root": run / "world"}
    if eval_data:
        place["eval_data"] = eval_data
    return {name: str(path) for name, path in place.items()}


def _speech(run: Path, name: str) -> dict[str, str]:
    """For a training on all recordings, of users and the assistant."""
    world = run / "world"
    return _place(run, name, world / "speech_train.jsonl", world / "speech_validation.jsonl")


def _train(
    train: Callable[[Any, bool], TrainingResult], settings: CodecTrainingConfig | FinetuneConfig
) -> None:
    outcome = train(settings, bool(all_checkpoints(Path(settings.output))))
    if not outcome.complete:
        raise TrainingError(f"stopped at step {outcome.step}; the same command resumes there")
