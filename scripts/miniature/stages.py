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
from dataclasses import dataclass
from pathlib import Path

from kimia_infer.utils.files import locked


class StageError(RuntimeError):
    """A stage cannot be made now; the message says why."""


@dataclass(frozen=True)
class Stage:
    """The result of a stage in the folder of a run, and the stages that it needs."""

    result: str
    needs: tuple[str, ...] = ()


STAGES = {
    "world": Stage("world"),
    "tokenizer": Stage("tokenizer/final", ("world",)),
    "whisper": Stage("whisper/final", ("world",)),
    "encoder": Stage("encoder", ("tokenizer",)),
    "base": Stage("base", ("encoder", "whisper")),
    "conversations": Stage("conversations/train.jsonl", ("base",)),
    "language_model": Stage("language_model/final", ("conversations",)),
    "vocoder": Stage("vocoder/final", ("world",)),
    "detokenizer": Stage("detokenizer/final", ("encoder",)),
    "mini": Stage("mini", ("language_model", "detokenizer", "vocoder")),
    "figures": Stage("figures", ("mini",)),
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
    """Make the result of a stage, unless it is there, with a function of :mod:`recipe`.

    Raises:
        StageError: a stage that it needs is not done, or another process makes it.
    """
    if done(run, name):
        return
    missing = [needed for needed in STAGES[name].needs if not done(run, needed)]
    if missing:
        raise StageError(f"{name}: needs {', '.join(missing)} to be done first")
    try:
        with locked(run / f".{name}.lock"):
            from scripts.miniature import recipe

            getattr(recipe, f"make_{name}")(run)
    except BlockingIOError:
        raise StageError(f"{name}: another process is making it in {run}") from None
