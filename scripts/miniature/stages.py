"""The miniature from nothing: its stages in order, their settings, and where they leave results.

A stage is done when its result exists, which appears whole; an interrupted training goes on from
its last checkpoint. Below the folder of a run lie

    world/                         sounds and lists, see spoken_world
    vocoder/ tokenizer/ detokenizer/ whisper/ language_model/
                                   trainings: checkpoints, metrics, loss plot, ``final``
    encoder/                       the speech tokenizer as it is stored: in half precision
    base/                          a checkpoint whose language model is untrained
    conversations/                 what it is trained on, see conversations.py
    mini/                          what is served
    figures/                       what was measured on mini, see figures.py
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from kimia_infer.models.kimi_audio.layout import WHISPER_FOLDER
from kimia_infer.models.kimi_audio.published import (
    DETOKENIZER_FOLDER,
    SPEECH_TOKENIZER_FOLDER,
    VOCODER_FOLDER,
)
from kimia_infer.training.checkpoints import (
    TrainingError,
    all_checkpoints,
    live,
    publish,
    write_tensors,
)
from kimia_infer.training.config import FinetuneSettings
from kimia_infer.training.run_directory import FINAL
from kimia_infer.training.tasks.config import (
    CodecSettings,
    DetokenizerSettings,
    DiTSize,
    EncoderSize,
    GeneratorSize,
    TokenizerSettings,
    VocoderSettings,
)
from kimia_infer.training.tasks.detokenizer import train_detokenizer
from kimia_infer.training.tasks.finetune import finetune
from kimia_infer.training.tasks.speech_tokenizer import train_tokenizer
from kimia_infer.training.tasks.vocoder import new_config, train_vocoder
from kimia_infer.training.trainer import Outcome
from scripts.miniature.assembly import assemble, write_base
from scripts.miniature.conversations import write_conversations
from scripts.miniature.figures import write_figures
from scripts.miniature.spoken_world import WorldSize, write_world
from scripts.miniature.whisper_encoder import WhisperSettings, train_whisper

WORLD = WorldSize()
MEASURED = 100
"""Cases of each kind that the figures are from."""

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
    """Raises SynthesisError if espeak-ng is missing."""
    part = run / ".world.part"
    shutil.rmtree(part, ignore_errors=True)
    write_world(part, WORLD, os.cpu_count() or 1)
    publish(part, run / "world")


def make_vocoder(run: Path) -> None:
    _train(train_vocoder, VocoderSettings(**_place(run, "vocoder", "answers"), **VOCODER))


def make_tokenizer(run: Path) -> None:
    place = _place(run, "tokenizer", "speech")
    _train(train_tokenizer, TokenizerSettings(**place, **TOKENIZER))


def make_encoder(run: Path) -> None:
    """Round the tokenizer to half precision, so that all codes are those of what is stored."""
    source, part = run / "tokenizer" / FINAL / SPEECH_TOKENIZER_FOLDER, run / ".encoder.part"
    shutil.rmtree(part, ignore_errors=True)
    folder = part / SPEECH_TOKENIZER_FOLDER
    folder.mkdir(parents=True)
    shutil.copyfile(source / "config.json", folder / "config.json")
    # The means behind the code book are for training alone.
    tensors = {
        name: tensor.half()
        for name, tensor in load_file(source / "model.safetensors").items()
        if not name.startswith("ema_")
    }
    stored = [live(name, tensor) for name, tensor in tensors.items()]
    write_tensors(folder / "model.safetensors", stored, writes=True)
    # The detokenizer's training asks for the spectrogram that the vocoder takes.
    (part / VOCODER_FOLDER).mkdir()
    config = new_config(VocoderSettings(data="", output="", **VOCODER))
    text = json.dumps(config, indent=1) + "\n"
    (part / VOCODER_FOLDER / "config.json").write_text(text, encoding="utf-8")
    publish(part, run / "encoder")


def make_detokenizer(run: Path) -> None:
    place = _place(run, "detokenizer", "voice") | {"model": str(run / "encoder")}
    _train(train_detokenizer, DetokenizerSettings(**place, **DETOKENIZER))


def _place(run: Path, name: str, sounds: str) -> dict[str, str]:
    world = run / "world"
    place = {
        "output": str(run / name),
        "data": str(world / f"{sounds}_train.jsonl"),
        "audio_root": str(world),
    }
    if sounds == "speech":
        place["eval_data"] = str(world / "speech_validation.jsonl")
    return place


def make_whisper(run: Path) -> None:
    """From all sounds of users and the assistant."""
    place = _place(run, "whisper", "speech")
    _train(train_whisper, WhisperSettings(**place, **WHISPER))


def make_base(run: Path) -> None:
    part = run / ".base.part"
    shutil.rmtree(part, ignore_errors=True)
    whisper = run / "whisper" / FINAL / WHISPER_FOLDER
    write_base(part, run / "encoder" / SPEECH_TOKENIZER_FOLDER, whisper)
    publish(part, run / "base")


def make_conversations(run: Path) -> None:
    """In place, since the lists name sounds that are written with them; train.jsonl comes last."""
    write_conversations(run / "world", run / "base", run / "conversations")


def make_language_model(run: Path) -> None:
    conversations = run / "conversations"
    place = {
        "model": str(run / "base"),
        "data": str(conversations / "train.jsonl"),
        "eval_data": str(conversations / "validation.jsonl"),
        "output": str(run / "language_model"),
        "feature_cache": str(conversations / "features"),
    }
    _train(finetune, FinetuneSettings(**place, **LANGUAGE_MODEL))


def make_mini(run: Path) -> None:
    assemble(
        run / "language_model" / FINAL,
        run / "detokenizer" / FINAL / DETOKENIZER_FOLDER,
        run / "vocoder" / FINAL / VOCODER_FOLDER,
        run / "mini",
    )


def make_figures(run: Path) -> None:
    part = run / ".figures.part"
    shutil.rmtree(part, ignore_errors=True)
    write_figures(run / "mini", run / "world", part, MEASURED)
    publish(part, run / "figures")


@dataclass(frozen=True)
class Stage:
    """A step of the way.

    ``make`` makes ``result`` in the folder of a run, from the results of the stages it ``needs``.
    """

    make: Callable[[Path], None]
    result: str
    needs: tuple[str, ...] = ()


STAGES = {
    "world": Stage(make_world, "world"),
    "tokenizer": Stage(make_tokenizer, "tokenizer/final", ("world",)),
    "whisper": Stage(make_whisper, "whisper/final", ("world",)),
    "encoder": Stage(make_encoder, "encoder", ("tokenizer",)),
    "base": Stage(make_base, "base", ("encoder", "whisper")),
    "conversations": Stage(make_conversations, "conversations/train.jsonl", ("base",)),
    "language_model": Stage(make_language_model, "language_model/final", ("conversations",)),
    "vocoder": Stage(make_vocoder, "vocoder/final", ("world",)),
    "detokenizer": Stage(make_detokenizer, "detokenizer/final", ("encoder",)),
    "mini": Stage(make_mini, "mini", ("language_model", "detokenizer", "vocoder")),
    "figures": Stage(make_figures, "figures", ("mini",)),
}
"""In an order in which each finds what it needs; those that others wait for come first."""


def done(run: Path, name: str) -> bool:
    return (run / STAGES[name].result).exists()


def ready(run: Path, running: Collection[str] = ()) -> list[str]:
    """The stages that can begin."""
    return [
        name
        for name, stage in STAGES.items()
        if not done(run, name) and name not in running and all(done(run, n) for n in stage.needs)
    ]


def make(run: Path, name: str) -> None:
    """Make the result of a stage, unless it is there.

    Raises:
        TrainingError: a stage that it needs is not done, another process makes it, or it was
            interrupted.
    """
    if done(run, name):
        return
    missing = [needed for needed in STAGES[name].needs if not done(run, needed)]
    if missing:
        raise TrainingError(f"{name}: needs {', '.join(missing)} to be done first")
    run.mkdir(parents=True, exist_ok=True)
    with (run / f".{name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainingError(f"{name}: another process is making it in {run}") from None
        STAGES[name].make(run)


def _train(
    train: Callable[[Any, bool], Outcome], settings: CodecSettings | FinetuneSettings
) -> None:
    outcome = train(settings, bool(all_checkpoints(Path(settings.output))))
    if not outcome.complete:
        raise TrainingError(f"stopped at step {outcome.step}; the same command goes on from there")
