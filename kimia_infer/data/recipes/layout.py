"""What recipes share: reading the files of a data set, and the rows and questions they make."""

from __future__ import annotations

import json
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kimia_infer.data.conversations import DataError
from kimia_infer.data.manifests import Metric, opened, read_table

Row = dict[str, Any]
"""A row of a manifest, with an absolute path."""

BRIEFLY = (
    ".Answer with the option's letter from the given choices directly "
    "and only give the best option."
)
"""The end of every question with options (published evaluation)."""


def options_question(question: str, choices: Sequence[str]) -> str:
    """A question with lettered options, one per line, as the published evaluation writes it."""
    return "\n".join([question, "Options:", *lettered(choices), BRIEFLY])


def lettered(choices: Sequence[str]) -> list[str]:
    """Choices, 26 at most, as ``(A) one``, ``(B) another`` …"""
    return [f"({string.ascii_uppercase[i]}) {choice}" for i, choice in enumerate(choices)]


def row(
    dataset: str,
    subset: str,
    name: str,
    audio: Path,
    question: str,
    reference: str,
    metric: Metric,
    language: str = "en",
) -> Row:
    """A row of a manifest, whose fields :class:`~kimia_infer.data.manifests.AudioRow` explains."""
    path = str(audio.absolute())
    names = ("dataset", "subset", "id", "audio", "question", "reference", "metric", "language")
    values = (dataset, subset, name, path, question, reference, metric, language)
    return dict(zip(names, values, strict=True))


def inside(folder: Path, name: str) -> Path:
    """The folder ``name`` in ``folder``, or ``folder`` where it is that one itself."""
    return folder / name if (folder / name).is_dir() else folder


def find(folder: Path, *names: str) -> Path:
    """The first of ``names`` that exists below ``folder``. Raises DataError if none does."""
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise DataError(f"{folder}: not the layout of this data set, {' or '.join(names)} missing")


def lines(path: Path) -> Iterator[str]:
    """The non-empty lines of a text file. Raises DataError."""
    with opened(path) as file:
        yield from (line.rstrip("\r\n") for line in file if line.strip())


def table(path: Path, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """The rows of a CSV file that has ``columns``. Raises DataError."""
    for line, values in read_table(path):
        if isinstance(values, DataError):
            raise DataError(f"{path}:{line}: {values}") from values
        missing = [column for column in columns if column not in values]
        if missing:
            raise DataError(f"{path}: no column {', '.join(missing)}")
        yield values


def document(path: Path) -> Any:
    """The content of a JSON file. Raises DataError."""
    with opened(path) as file:
        return json.load(file)


def fields(values: Any, names: Sequence[str], where: str) -> list[Any]:
    """The fields ``names`` of a JSON object. Raises DataError."""
    if not isinstance(values, dict) or not values.keys() >= set(names):
        raise DataError(f"{where}: expected an object with {', '.join(names)}")
    return [values[name] for name in names]
