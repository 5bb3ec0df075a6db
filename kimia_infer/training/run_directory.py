"""The directory of a training run: how a run begins, continues and ends there.

    settings.yaml metrics.jsonl loss.png tensorboard/
    checkpoints/step-00000010/model/    can be served or applied
    checkpoints/step-00000010/state/    from which the run continues
    final/                              the model of the last step

The module imports nothing slow, so that a command reports what is wrong at once.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from kimia_infer.training.config import TrainingConfig, raise_faults
from kimia_infer.utils.errors import CheckpointError
from kimia_infer.utils.files import link_or_copy, replacing_directory, write_text
from kimia_infer.weights.header import read_header

FINAL, CHECKPOINTS, MODEL, STATE = "final", "checkpoints", "model", "state"
SETTINGS, METRICS, PLOT, BOARD = "settings.yaml", "metrics.jsonl", "loss.png", "tensorboard"
RECORD_FILE, STATE_FILE = "state.json", "state.safetensors"
CARD = "README.md"
USE = "\n## Use\n"
"""Begins the last section of a card."""

_STEP = re.compile(r"step-(\d{8})")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")

FREE_TO_CHANGE = (
    "output", "model", "data", "eval_data", "audio_root", "device", "workers", "cache_hours",
    "feature_cache", "eval_every", "save_every", "keep_checkpoints", "gradient_checkpointing",
    "batch_size", "accumulation", "cache_gigabytes",
)  # fmt: skip
"""Settings that a resumed run may change, because its steps do not depend on them: files may have
moved, and of batch_size, accumulation and processes only the product has to stay."""


log = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """A run cannot begin or continue; the message says why and what to do."""


def all_checkpoints(output: Path) -> list[Path]:
    """The checkpoints of a run that were written completely, oldest first."""
    folder = output / CHECKPOINTS
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if _STEP.fullmatch(path.name))


def read_record(checkpoint: Path) -> dict[str, Any]:
    """What is recorded of a checkpoint: step, settings, data. Raises TrainingError."""
    path = checkpoint / STATE / RECORD_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise ValueError("no record of a step")
        for name in ("files", "settings"):
            if not isinstance(record.get(name, {}), dict):
                raise ValueError(f"{name}: expected an object")
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path}: damaged ({error})") from error
    return record


def damage(checkpoint: Path) -> str | None:
    """What of a checkpoint is missing, cut short or no longer readable: a message that names it.

    A disk that filled up or a copy that broke off does that to a checkpoint which was complete.
    """
    try:
        for name, size in read_record(checkpoint).get("files", {}).items():
            path = checkpoint / name
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                return f"{path}: " + ("missing" if found is None else f"{found} of {size} bytes")
        for path in {checkpoint / STATE / STATE_FILE, *checkpoint.rglob("*.safetensors")}:
            read_header(path)
    except (TrainingError, CheckpointError) as error:
        return str(error)
    return None


def newest_intact(output: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a run without damage, and what is wrong with those after it."""
    faults = []
    for checkpoint in reversed(all_checkpoints(output)):
        fault = damage(checkpoint)
        if fault is None:
            return checkpoint, faults
        faults.append(fault)
    return None, faults


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
    return [*faults, *_resume_faults(values, Path(output))] if resume else faults


def _resume_faults(values: Mapping[str, Any], output: Path) -> list[str]:
    """What keeps a run with the settings ``values`` from continuing the one in ``output``."""
    checkpoint, damaged = newest_intact(output)
    if checkpoint is None:
        reasons = "".join(f"; {fault}" for fault in damaged)
        return [f"output: {output} holds no checkpoint to resume from{reasons}"]
    before = read_record(checkpoint).get("settings", {})
    return [
        f"{name}: {value!r}, but {checkpoint} was trained with {before.get(name)!r}; resume "
        "with the same settings"
        for name, value in values.items()
        if name not in FREE_TO_CHANGE and _differs(value, before.get(name))
    ]


def _differs(value: Any, before: Any) -> bool:
    if isinstance(value, dict) and isinstance(before, dict):
        return any(_differs(inner, before.get(name)) for name, inner in value.items())
    return value != before


def checkpoint_to_resume(config: TrainingConfig, resume: bool) -> Path | None:
    """The checkpoint to continue from, or None at the beginning of a run.

    It is the newest one without damage; a warning names what is wrong with newer ones.

    Raises:
        ConfigurationError: with everything that :func:`path_faults` finds.
    """
    raise_faults(path_faults(config.model_dump(mode="json"), resume))
    if not resume:
        return None
    checkpoint, damaged = newest_intact(Path(config.output))
    for fault in damaged:
        log.warning("%s; continuing from the older %s", fault, checkpoint)
    return checkpoint


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
    """The metrics of a run so far, without lines that an interruption or the disk damaged."""
    path = output / METRICS
    metrics = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else [], 1):
        try:
            values = json.loads(line)
        except ValueError:
            values = None
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            metrics.append(values)
        else:
            log.warning("%s:%d: not metrics of a step, left out", path, number)
    return metrics
