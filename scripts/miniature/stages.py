"""The stages in which the miniature is made from nothing, and where they leave results.

A stage is done when its result exists, which appears whole; an interrupted training resumes from
its last checkpoint. This module needs the standard library only. The folder of a run contains

    world/                         recordings and lists, see spoken_world
    kokoro/                        the voices of people and of the assistant
    voice/                         all that the assistant says, see voice.py
    people/                        recordings and lists of people, see people.py
    speech/                        lists of all recordings
    start/                         a language model to begin with, if there is one
    vocoder/ tokenizer/ detokenizer/ language_model/
                                   trainings: checkpoints, metrics, loss plot, ``final``
    whisper/                       the encoder of Whisper tiny.en
    encoder/                       the speech tokenizer in half precision, as it is stored
    base/                          a checkpoint whose language model is to be trained
    conversations/                 its training data, see conversations.py
    held_out/                      a world of which nothing is trained on
    held_out_people/               people who ask in it
    prompts/                       of a real person, for measurements
    mini/                          the final checkpoint
    figures/                       measurements of mini, see figures.py
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

STAGES = {
    "kokoro": (),
    "world": (),
    "whisper": (),
    "people": ("kokoro",),
    "voice": ("kokoro",),
    "tokenizer": ("world", "voice", "people"),
    "encoder": ("tokenizer",),
    "base": ("encoder", "whisper"),
    "conversations": ("base",),
    "language_model": ("conversations",),
    "vocoder": ("voice",),
    "detokenizer": ("encoder",),
    "mini": ("language_model", "detokenizer", "vocoder"),
    "held_out": (),
    "prompts": ("mini",),
    "figures": ("mini", "held_out", "prompts"),
}
"""Every stage with those that it needs, in an order in which each finds what it needs; those that
others wait for come first. The prompts need nothing, but a run ends where they cannot be had, so
the miniature is made before."""

TRAININGS = ("tokenizer", "language_model", "vocoder", "detokenizer")

WIDE = ("language_model", "figures")
"""Stages that are made with all cores, though others may run: all wait for them at the end."""

LISTS = ("people", "voice", "conversations")
"""Stages whose last file is a list, since they resume."""

START = "start"
"""Folder of a language model to begin with."""


def result(run: Path, name: str) -> Path:
    """What exists when a stage is done."""
    if name in TRAININGS:
        return run / name / "final"
    if name == "kokoro":
        return run / name / "download.json"  # written last
    return run / name / "train.jsonl" if name in LISTS else run / name


def ready(run: Path, running: Collection[str] = ()) -> list[str]:
    """The stages that can begin."""
    done = {name for name in STAGES if result(run, name).exists()}
    left = [name for name in STAGES if name not in done and name not in running]
    return [name for name in left if done.issuperset(STAGES[name])]


def make(run: Path, name: str) -> None:
    """Make the result of a stage, unless it is there, with a function of :mod:`recipe`.

    Raises:
        TrainingError: a stage that it needs is not done, or another process makes it.
    """
    if result(run, name).exists():
        return
    from kimia_infer.training.run_directory import TrainingError
    from kimia_infer.utils.files import locked

    missing = [needed for needed in STAGES[name] if not result(run, needed).exists()]
    if missing:
        raise TrainingError(f"{name}: needs {', '.join(missing)} to be done first")
    try:
        with locked(run / f".{name}.lock"):
            from scripts.miniature import recipe

            getattr(recipe, f"make_{name}")(run)
    except BlockingIOError:
        raise TrainingError(f"{name}: another process is making it in {run}") from None
