"""What the results in a directory are results of."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.evaluation.items import EvaluationError, Item

FILE_NAME = "settings.json"
LATER = {"quantization": "none", "kv_cache": "none"}
"""Of the model's facts: those that directories begun earlier do not have, and what they were."""

PACKAGES = ("torch", "transformers", "jiwer", "whisper-normalizer")


@dataclass(frozen=True)
class Settings:
    """What a run depends on besides its manifests.

    ``sampling`` are arguments of ``KimiAudio.generate`` by name, ``seed`` among them, which every
    item gets. ``limit`` takes the first items of every manifest only.
    """

    weights: str
    adapter: str | None = None
    device: str | None = None
    dtype: str | None = None
    limit: int | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    quantization: str | None = None


class Record:
    """The settings, items and machine that a directory's results come from, in a file of it.

    ``continues`` says that there are results, which have to be of these settings and items.

    Raises:
        EvaluationError: the directory holds results of other settings or items.
    """

    def __init__(self, folder: Path, settings: Settings, items: Sequence[Item], continues: bool):
        self.folder = folder
        content = json.dumps([asdict(item) for item in items], ensure_ascii=False)
        run = asdict(settings) | {"items_sha256": hashlib.sha256(content.encode()).hexdigest()}
        self.path = folder / FILE_NAME
        if continues:
            self.values = json.loads(self.path.read_text(encoding="utf-8"))
        else:
            self._write({"settings": run, "environment": _environment()})
        self._check(self.values["settings"], run)

    def note_model(self, model: KimiAudio) -> None:
        """Note how the model runs; raise EvaluationError if earlier results had it otherwise."""
        facts = {
            "device": model.device.type,
            "dtype": str(model.dtype).removeprefix("torch."),
            "attention": model.decoder.backend.name,
            "head_rows": model.head_rows,
            "quantization": model.quantization,
            "kv_cache": model.decoder.kv_cache,
        }
        if "model" not in self.values:
            self._write(self.values | {"model": facts})
        self._check(LATER | self.values["model"], facts)

    def _check(self, found: dict[str, Any], values: dict[str, Any]) -> None:
        for name, value in values.items():
            if found.get(name) != value:
                what = "other items" if name == "items_sha256" else f"{name} {found.get(name)!r}"
                raise EvaluationError(
                    f"{self.folder}: holds results with {what}; name another directory for the "
                    "output, or delete this one"
                )

    def _write(self, values: dict[str, Any]) -> None:
        self.values = values
        write_whole(self.path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears whole under its name, replacing an earlier one."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _environment() -> dict[str, Any]:
    """Where and when a run begins: date, machine and versions."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.platform()}, {os.cpu_count()} CPUs",
        "accelerator": _accelerator(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _accelerator() -> str | None:
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return None
    name = getattr(torch.get_device_module(device), "get_device_name", None)
    return name() if name is not None else device.type
