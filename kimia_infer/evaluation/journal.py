"""Results of a run as they come, one line each, so that an interrupted run goes on."""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from kimia_infer.evaluation.items import EvaluationError, Key

FILE_NAME = "results.jsonl"


@dataclass(frozen=True)
class Result:
    """What became of an item: an answer, or an error that says why there is none.

    ``seconds`` is what loading its sounds and answering took, from its turn to its end, in which
    up to ``batch_size`` items were answered together; ``wall_seconds`` is the time since the
    result before it, whichever item that was, in which the next sounds were loaded, too.
    """

    key: Key
    wall_seconds: float
    answer: str | None = None
    error: str | None = None
    seconds: float = 0.0
    audio_seconds: float = 0.0
    stop_reason: str | None = None
    notes: tuple[str, ...] = ()
    batch_size: int = 1


class Journal:
    """The results in a directory, for one run at a time.

    A later result of an item replaces an earlier one; a line that an interruption cut short is
    dropped.

    Raises:
        EvaluationError: another run writes to the directory, or the file is damaged.
    """

    def __init__(self, folder: Path):
        self.path = folder / FILE_NAME
        self.results: dict[Key, Result] = {}

    def __enter__(self) -> Journal:
        self._file = self.path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise EvaluationError(f"{self.path}: another run is writing to it") from error
        try:
            self._read()
        except EvaluationError:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, result: Result) -> None:
        """Write a result; once this returns, it survives the end of the process."""
        line = json.dumps(asdict(result), ensure_ascii=False).encode()
        self._file.write(line + b"\n")
        self._file.flush()
        self.results[result.key] = result

    def forget_errors(self) -> None:
        """Have the items that failed asked again."""
        self.results = {k: r for k, r in self.results.items() if r.error is None}

    def _read(self) -> None:
        self._file.seek(0)
        place = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                self._file.truncate(place)
                break
            place += len(line)
            result = _parse(line, f"{self.path}:{number}")
            self.results[result.key] = result
        self._file.seek(0, os.SEEK_END)


def _parse(line: bytes, where: str) -> Result:
    try:
        values: dict[str, Any] = json.loads(line)
        dataset, subset, name = values.pop("key")
        notes = tuple(values.pop("notes"))
        known = {field.name for field in fields(Result)}
        if values.keys() - known:
            raise ValueError("unknown fields")
        return Result((dataset, subset, name), notes=notes, **values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise EvaluationError(
            f"{where}: damaged ({error}); delete this line, and its item is asked again"
        ) from error
