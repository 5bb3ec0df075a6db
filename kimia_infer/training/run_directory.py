"""The directory of a training run: how a run begins, continues and ends there.

    settings.yaml metrics.jsonl loss.png tensorboard/
    checkpoints/step-00000010/model/    can be served or applied
    checkpoints/step-00000010/state/    from which the run continues
    final/                              the model of the last step

The module imports nothing slow, so that a command reports what is wrong at once.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from kimia_infer.training.config import TrainingConfig, raise_faults
from kimia_infer.utils.files import link_or_copy, replacing_directory, write_text

FINAL, CHECKPOINTS, MODEL, STATE = "final", "checkpoints", "model", "state"
SETTINGS, METRICS, PLOT, BOARD = "settings.yaml", "metrics.jsonl", "loss.png", "tensorboard"
CARD = "README.md"
USE = "\n## Use\n"
"""Begins the last section of a card."""

_STEP = re.compile(r"step-(\d{8})")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")

FREE_TO_CHANGE = (
    "output", "model", "data", "eval_data", "audio_root", "device", "workers", "cache_hours",
    "feature_cache", "eval_every", "save_every", "keep_checkpoints", "gradient_checkpointing",
    "batch_size", "accumulation",
)  # fmt: skip
"""Settings that a resumed run may change, because its steps do not depend on them: files may have
moved, and of batch_size, accumulation and processes only the product has to stay."""


class TrainingError(RuntimeError):
    """A run cannot begin or continue; the message says why and what to do."""


def all_checkpoints(output: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folder = output / CHECKPOINTS
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if _STEP.fullmatch(path.name))


def read_record(checkpoint: Path) -> dict[str, Any]:
    """What is recorded of a checkpoint: step, settings, data. Raises TrainingError."""
    path = checkpoint / STATE / "state.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path}: damaged ({error}); delete {checkpoint}") from error


def path_faults(values: Mapping[str, Any], resume: bool) -> list[str]:
    """What is wrong with the paths in the settings of a run, and with resuming it.

    Args:
        values: settings, which may be incomplete or of the wrong type.
        resume: whether a run in ``output`` is to be continued.
    """
    faults = []
    for name in ("data", "eval_data", "audio_root", "initial"):
        value = values.get(name)
        if isinstance(value, str) and not Path(value).exists():
            faults.append(f"{name}: {value} does not exist")
    model = values.get("model")
    if isinstance(model, str) and not (Path(model).is_dir() or _HUB_NAME.fullmatch(model)):
        faults.append(f"model: {model} is neither a directory nor owner/name on the hub")
    output = values.get("output")
    if not isinstance(output, str):
        return faults
    found = all_checkpoints(Path(output))
    if found and not resume:
        faults.append(
            f"output: {output} holds {found[-1].name} of another run; continue it with --resume, "
            "or name another directory"
        )
    if resume and not found:
        faults.append(f"output: {output} holds no checkpoint to resume from")
    if resume and found:
        try:
            before = read_record(found[-1])["settings"]
        except TrainingError as error:
            return [*faults, str(error)]
        faults += [
            f"{name}: {value!r}, but {found[-1]} was trained with {before.get(name)!r}; resume "
            "with the same settings"
            for name, value in values.items()
            if name not in FREE_TO_CHANGE and _differs(value, before.get(name))
        ]
    return faults


def _differs(value: Any, before: Any) -> bool:
    if isinstance(value, dict) and isinstance(before, dict):
        return any(_differs(inner, before.get(name)) for name, inner in value.items())
    return value != before


def checkpoint_to_resume(config: TrainingConfig, resume: bool) -> Path | None:
    """The checkpoint to continue from, or None at the beginning of a run.

    Raises:
        ConfigurationError: with everything that :func:`path_faults` finds.
    """
    raise_faults(path_faults(config.model_dump(mode="json"), resume))
    return all_checkpoints(Path(config.output))[-1] if resume else None


def write_settings(config: TrainingConfig) -> None:
    """Write the settings into the directory of the run, for readers and the same run again."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    write_text(Path(config.output) / SETTINGS, text)


def finish(checkpoint: Path, output: Path) -> None:
    """The model of the last ``checkpoint`` as ``final``, which outlives checkpoints."""
    model = checkpoint / MODEL
    with replacing_directory(output / FINAL) as partial:
        shutil.copytree(model, partial, copy_function=copy_file, dirs_exist_ok=True)


def copy_file(path: str | Path, new: str | Path) -> None:
    """A copy of a file; of weights a hard link where the file system allows."""
    if Path(path).suffix in (".safetensors", ".pt"):
        link_or_copy(Path(path), Path(new))
    else:
        shutil.copyfile(path, new)


def read_metrics(output: Path) -> list[dict[str, float]]:
    """The metrics of a run so far, without a last line that an interruption cut short."""
    path = output / METRICS
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]
