"""Other manifests of sounds and texts (CSV, TSV, JSONL) as training data."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kimia_infer.data.conversations import UNDERSTANDING, DataError, write_lines

AUDIO_FIELDS = (
    "audio", "audio_path", "audio_filepath", "audio_file", "path", "wav", "file", "file_name",
    "filename",
)  # fmt: skip
TEXT_FIELDS = ("text", "sentence", "transcript", "transcription", "normalized_text", "answer")
QUESTION = "Please transcribe the spoken content into written text."


@dataclass(frozen=True)
class Columns:
    """Names of the fields to read; None stands for the one usual name that occurs.

    Without ``question``, every sample asks the same.
    """

    audio: str | None = None
    text: str | None = None
    question: str | None = None


def convert_manifest(
    source: Path, target: Path, audio_root: Path, columns: Columns, question: str = QUESTION
) -> tuple[int, list[str]]:
    """Write a manifest as conversations: a question and a sound, answered by the text.

    Relative paths begin at ``audio_root``; absolute ones are written. Rows without text or
    whose sound does not exist are left out.

    Returns:
        The number of lines written, and what is wrong with the rows left out.

    Raises:
        DataError: the manifest cannot be read, or it is unclear which fields to use.
    """
    faults: list[str] = []
    rows = []
    for line, row in read_rows(source):
        if isinstance(row, DataError):
            raise DataError(f"{source}:{line}: {row}") from row
        rows.append((line, row))
    if not rows:
        raise DataError(f"{source}: no rows")
    names = rows[0][1]
    audio_field = _choose(source, names, columns.audio, AUDIO_FIELDS, "audio")
    text_field = _choose(source, names, columns.text, TEXT_FIELDS, "text")
    question_field = columns.question and _choose(
        source, names, columns.question, (), "question-field"
    )

    def conversations() -> Iterator[dict]:
        for line, row in rows:
            try:
                audio, text = _value(row, audio_field), _value(row, text_field)
                asked = _value(row, question_field) if question_field else question
                path = (audio_root / audio).resolve()
                if not path.is_file():
                    raise DataError(f"{audio_field}: {path} is not a file")
            except DataError as error:
                faults.append(f"{source}:{line}: {error}")
                continue
            yield _conversation(asked, str(path), text)

    count = write_lines(target, conversations())
    if not count:
        target.unlink()
        raise DataError(f"{source}: no row can be used; the first: {faults[0]}")
    return count, faults


def _conversation(question: str, audio: str, text: str) -> dict:
    messages = [
        ("user", "text", question),
        ("user", "audio", audio),
        ("assistant", "text", text),
    ]
    keys = ("role", "message_type", "content")
    return {
        "task_type": UNDERSTANDING,
        "conversation": [dict(zip(keys, message, strict=True)) for message in messages],
    }


def read_rows(path: Path) -> Iterator[tuple[int, dict | DataError]]:
    """The rows of a CSV, TSV or JSONL file with their line numbers.

    A line that is not a JSON object is a DataError that says why. Raises one if the file cannot
    be read.
    """
    kind = path.suffix.lower()
    if kind not in (".csv", ".tsv", ".jsonl"):
        raise DataError(f"{path}: expected a file .csv, .tsv or .jsonl")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if kind == ".jsonl":
                yield from ((n, _json_row(line)) for n, line in enumerate(file, 1) if line.strip())
                return
            csv.field_size_limit(sys.maxsize)
            if kind == ".tsv":
                reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            else:
                reader = csv.DictReader(file)
            for row in reader:
                yield reader.line_num, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def _json_row(line: str) -> dict | DataError:
    try:
        row = json.loads(line)
    except ValueError as error:
        return DataError(f"not valid JSON ({error})")
    return row if isinstance(row, dict) else DataError("expected a JSON object")


def _choose(source: Path, row: dict, wanted: str | None, usual: tuple[str, ...], what: str) -> str:
    names = [str(name) for name in row]
    found = [wanted] if wanted in names else [] if wanted else [n for n in usual if n in names]
    if len(found) != 1:
        problem = f"no field {wanted!r}" if wanted else f"{len(found)} fields could be the {what}"
        raise DataError(
            f"{source}: {problem}; name one with --{what}, there are {', '.join(names)}"
        )
    return found[0]


def _value(row: dict, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{name}: expected text, found {value!r}")
    return value.strip()
