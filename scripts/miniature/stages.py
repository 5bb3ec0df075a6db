"""The stages in which the miniature is made from nothing, and where they leave results.

A stage is done when its result exists, which appears whole; an interrupted training resumes from
its last checkpoint. This module needs the standard library only. The folder of a run contains

    world/                         recordings and lists, see spoken_world
    vocoder/ tokenizer/ detokenizer/ whisper/ language_model/
                                   trainings: checkpoints, metrics, loss plot, ``final``
    encoder/                       the speech tokenizer in half precision, as it is stored
    base/                          a checkpoint whose language model is untrained
    conversations/                 its training data, see conversations.py
    mini/                          the final checkpoint
    figures/                       measurements of mini, see figures.py
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

STAGES = {
    "world": (),
    "tokenizer": ("world",),
    "whisper": ("world",),
    "encoder": ("tokenizer",),
    "base": ("encoder", "whisper"),
    "conversations": ("base",),
    "language_model": ("conversations",),
    "vocoder": ("world",),
    "detokenizer": ("encoder",),
    "mini": ("language_model", "detokenizer", "vocoder"),
    "figures": ("mini",),
}
"""Every stage with those that it needs, in an order in which each finds what it needs; those that
others wait for come first."""

TRAININGS = ("tokenizer", "whisper", "language_model", "vocoder", "detokenizer")


def result(run: Path, name: str) -> Path:
    """What exists when a stage is done."""
    if name in TRAININGS:
        return run / name / "final"
    return run / name / "train.jsonl" if name == "conversations" else run / name


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
