"""The rows of a batch, from JSON Lines, Parquet, or a directory of files."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from kimia_infer.cluster.store import Store, open_store
from kimia_infer.utils.errors import ConfigurationError

RESULT, ERROR = "result", "error"
ADDED = (RESULT, ERROR)
"""Fields that a batch adds to a row."""

TEXTS = (".txt",)


@dataclass(frozen=True)
class Row:
    """A row of the input: its name in it, and the fields that it has besides."""

    id: str
    fields: dict[str, Any]

    def finished(self, result: dict[str, Any] | None, error: str | None) -> dict[str, Any]:
        """The row of the output."""
        return {"id": self.id, **self.fields, RESULT: result, ERROR: error}


@dataclass(frozen=True)
class Source:
    """All rows of an input; relative paths in them begin at ``folder``."""

    folder: str
    rows: Sequence[Row]

    @property
    def digest(self) -> str:
        """A hash by which the same input is known."""
        content = json.dumps([(row.id, row.fields) for row in self.rows], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def read_source(name: str, field: str, suffixes: Collection[str]) -> Source:
    """The rows of ``name``: FILE.jsonl, FILE.parquet, or a directory, each a path or a URL.

    A row of a file is called by its field ``id``, else by its number from 1. A directory has a row
    for each file with one of ``suffixes``, called by its path; ``field`` is ``audio`` for its
    path, or ``text`` for its content.

    Raises:
        ConfigurationError: it cannot be read, has no rows, two of the same id, or what no file
            of UTF-8 can hold.
    """
    if name.endswith((".jsonl", ".parquet")):
        folder, _, file = name.rpartition("/")
        store = open_store(folder or ("/" if name.startswith("/") else "."))
        try:
            content = store.read(file)
        except OSError as error:
            raise ConfigurationError(f"{name}: {error.strerror or error}") from error
        values = _json_lines(name, content) if file.endswith("l") else _parquet(name, content)
        rows = [_row(name, number, value) for number, value in enumerate(values, 1)]
    else:
        store = open_store(name)
        rows = _files(store, field, suffixes)
    if not rows:
        kinds = "no rows" if name.endswith((".jsonl", ".parquet")) else "no such files there"
        raise ConfigurationError(f"{name}: {kinds} (expected rows, or {', '.join(suffixes)})")
    for row in rows:
        try:
            json.dumps([row.id, row.fields], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ConfigurationError(f"{name}: {row.id!r}: not all of it is Unicode") from error
    twice = [row_id for row_id, count in Counter(row.id for row in rows).items() if count > 1]
    if twice:
        raise ConfigurationError(f"{name}: id: {twice[0]!r} is that of several rows")
    return Source(store.name, rows)


def _files(store: Store, field: str, suffixes: Collection[str]) -> list[Row]:
    names = [name for name in store.files() if name.lower().endswith(tuple(suffixes))]
    if field == "audio":
        return [Row(name, {"audio": name}) for name in names]
    return [Row(name, {"text": store.read(name).decode(errors="replace")}) for name in names]


def _json_lines(name: str, content: bytes) -> list[Any]:
    values = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            values.append(json.loads(line))
        except ValueError as error:
            raise ConfigurationError(f"{name}: line {number}: not valid JSON ({error})") from error
    return values


def _parquet(name: str, content: bytes) -> list[Any]:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.read_table(io.BytesIO(content)).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ConfigurationError(f"{name}: not Parquet ({error})") from error


def _row(name: str, number: int, value: Any) -> Row:
    where = f"{name}: row {number}"
    if not isinstance(value, dict):
        raise ConfigurationError(f"{where}: expected an object, found {str(value)[:60]!r}")
    if taken := [field for field in ADDED if field in value]:
        raise ConfigurationError(f"{where}: {taken[0]}: a batch adds this field; rename yours")
    fields = {key: item for key, item in value.items() if key != "id"}
    try:
        json.dumps(fields)
    except TypeError as error:
        raise ConfigurationError(f"{where}: {error}; expected texts and numbers") from error
    return Row(str(value.get("id", number)), fields)
