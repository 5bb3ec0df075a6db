"""The directory of a training run: how it begins, continues and ends there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import yaml

from kimia_infer.training.checkpoints import (
    MODEL,
    TrainingError,
    all_checkpoints,
    link_or_copy,
    publish,
    read_facts,
)
from kimia_infer.training.config import TrainingSettings, to_dict

FINAL, SETTINGS = "final", "settings.yaml"

FREE_TO_CHANGE = (
    "output",
    "model",
    "data",
    "eval_data",
    "audio_root",
    "device",
    "workers",
    "cache_hours",
    "feature_cache",
    "eval_every",
    "save_every",
    "keep_checkpoints",
    "gradient_checkpointing",
    "batch_size",  # with accumulation and processes; the product has to stay
    "accumulation",
)
"""Settings that a resumed run may change, because its steps do not depend on them; files may
have moved."""


def checkpoint_to_resume(settings: TrainingSettings, resume: bool) -> Path | None:
    """The checkpoint to continue from, or None at the beginning of a run.

    Raises:
        TrainingError: the directory does not suit, or its run has other settings.
    """
    output = Path(settings.output)
    found = all_checkpoints(output)
    if not resume:
        if found:
            raise TrainingError(
                f"output: {output} holds {found[-1].name} of another run; continue it with "
                "--resume, or name another directory"
            )
        return None
    if not found:
        raise TrainingError(f"output: {output} holds no checkpoint to resume from")
    before, asked = read_facts(found[-1])["settings"], to_dict(settings)
    for name, value in asked.items():
        if name not in FREE_TO_CHANGE and before.get(name) != value:
            raise TrainingError(
                f"{name}: {value!r}, but {found[-1]} was trained with {before.get(name)!r}; "
                "resume with the same settings"
            )
    return found[-1]


def note_settings(settings: TrainingSettings) -> None:
    """Write the settings into the directory of the run, for readers and the same run again."""
    output = Path(settings.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / SETTINGS).write_text(yaml.safe_dump(to_dict(settings), sort_keys=False))


def finish(checkpoint: Path, output: Path) -> None:
    """Give the model of the last ``checkpoint`` a name of its own, which outlives checkpoints."""
    model, final = checkpoint / MODEL, output / FINAL
    part = final.with_name(f".{final.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for folder, _, names in os.walk(model):
        target = part / Path(folder).relative_to(model)
        target.mkdir(parents=True, exist_ok=True)
        for name in names:
            link_or_copy(Path(folder) / name, target / name)
    publish(part, final)
