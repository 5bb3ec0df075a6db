"""The directory of a run: its results so far, and the configuration that they belong to."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.evaluation.items import Item, Key
from kimia_infer.utils.errors import explain
from kimia_infer.utils.files import Journal, write_text

RESULTS_NAME = "results.jsonl"
CONFIG_NAME = "settings.json"
PACKAGES = ("torch", "transformers", "jiwer", "whisper-normalizer")


class EvaluationError(ValueError):
    """An evaluation cannot be run; the message names file or option and the fix."""


class EvaluationConfig(BaseModel):
    """What the results of a run depend on, besides its manifests."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    weights: str = Field(description="checkpoint directory or owner/name[@revision]")
    adapter: str | None = Field(None, description="directory of an adapter to add to the weights")
    device: str | None = Field(None, description="such as cpu or cuda:1")
    dtype: str | None = Field(None, description="such as float32 or bfloat16")
    limit: int | None = Field(None, ge=1, description="only the first items of each manifest")
    sampling: dict[str, Any] = Field(
        default_factory=dict, description="arguments of KimiAudio.generate, the same for all items"
    )
    quantization: str | None = Field(None, description="of the matrices of the layers")


class Result(BaseModel):
    """The result of an item: an answer, or the error because of which there is none.

    ``seconds`` is the time from the turn of the item to its end, including the loading of its
    recordings; up to ``batch_size`` items were answered at the same time. ``wall_seconds`` is the
    time since the result before it, of whichever item.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    key: Key
    wall_seconds: float
    answer: str | None = None
    error: str | None = None
    seconds: float = 0.0
    audio_seconds: float = 0.0
    stop_reason: str | None = None
    notes: tuple[str, ...] = ()
    batch_size: int = 1


@dataclass
class Results:
    """The results of a run by item. A later result of an item replaces an earlier one."""

    journal: Journal
    by_key: dict[Key, Result] = field(default_factory=dict)

    def add(self, result: Result) -> None:
        """Store a result, which then survives the end of the process."""
        self.journal.add(result.model_dump(mode="json"))
        self.by_key[result.key] = result


@contextlib.contextmanager
def open_results(folder: Path) -> Iterator[Results]:
    """The results in ``folder``, for one run at a time.

    Raises:
        EvaluationError: another run writes to the directory, or a line is damaged.
    """
    path = folder / RESULTS_NAME
    with contextlib.ExitStack() as stack:
        try:
            journal = stack.enter_context(Journal(path))
        except BlockingIOError as error:
            raise EvaluationError(f"{path}: another run is writing to it") from error
        results = Results(journal)
        for number, (_, line) in enumerate(journal.lines(), 1):
            try:
                result = Result.model_validate_json(line)
            except ValidationError as error:
                raise EvaluationError(
                    f"{path}:{number}: damaged ({'; '.join(explain(error))}); delete this line, "
                    "and its item is answered again"
                ) from error
            results.by_key[result.key] = result
        yield results


class Record:
    """The configuration, items, model and machine of a run, in a file of its directory.

    Raises:
        EvaluationError: the run ``continues``, but its results belong to another configuration or
            other items.
    """

    def __init__(
        self, folder: Path, config: EvaluationConfig, items: Sequence[Item], continues: bool
    ):
        self.folder, self.path = folder, folder / CONFIG_NAME
        content = json.dumps([asdict(item) for item in items], ensure_ascii=False)
        digest = hashlib.sha256(content.encode()).hexdigest()
        settings = config.model_dump() | {"items_sha256": digest}
        if continues:
            self.values = json.loads(self.path.read_text(encoding="utf-8"))
        else:
            self._write({"settings": settings, "environment": _environment()})
        self._check(self.values["settings"], settings)

    def add_model(self, model: KimiAudio) -> None:
        """Record how the model runs. Raises EvaluationError if it ran differently before."""
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
        self._check(self.values["model"], facts)

    def _check(self, found: dict[str, Any], values: dict[str, Any]) -> None:
        for name, value in values.items():
            if found.get(name) != value:
                what = "other items" if name == "items_sha256" else f"{name} {found.get(name)!r}"
                raise EvaluationError(
                    f"{self.folder}: contains results with {what}; use another output directory, "
                    "or delete this one"
                )

    def _write(self, values: dict[str, Any]) -> None:
        self.values = values
        write_text(self.path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def _environment() -> dict[str, Any]:
    """Date, machine and versions of packages."""
    name = None
    if device := torch.accelerator.current_accelerator(check_available=True):
        module = torch.get_device_module(device)
        name = getattr(module, "get_device_name", lambda: device.type)()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.platform()}, {os.cpu_count()} CPUs",
        "accelerator": name,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }
