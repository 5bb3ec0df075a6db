"""Manifests: lists of recordings with texts, as CSV, TSV or JSON Lines.

An evaluation reads them as they are; for training they are converted to conversations.
"""

from __future__ import annotations

import csv
import functools
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import numpy as np
from pydantic import (
    AfterValidator,
    AliasChoices,
    BeforeValidator,
    Field,
    ValidationError,
    model_validator,
)

from kimia_infer.audio.files import SAMPLE_RATE, AudioError, load_audio, write_wav
from kimia_infer.data.conversations import UNDERSTANDING, DataError
from kimia_infer.data.parts import PartFields, cut
from kimia_infer.utils.errors import explain
from kimia_infer.utils.files import no_file, write_json_lines
from kimia_infer.utils.progress import progress

AUDIO_FIELDS = (
    "audio", "audio_path", "audio_filepath", "audio_file", "path", "wav", "file", "file_name",
    "filename",
)  # fmt: skip
TEXT_FIELDS = ("text", "sentence", "transcript", "transcription", "normalized_text", "answer")
REFERENCE_FIELDS = ("reference", *TEXT_FIELDS)
QUESTION_FIELDS = ("question", "prompt")
QUESTION = "Please transcribe the spoken content into written text."
CHOICE_SEPARATOR = "|"
"""Between the choices of a row of a CSV or TSV file."""
ROUNDING_SECONDS = 0.05
"""A part that leaves out less is the whole recording, whose length was rounded."""

WER, CER, ACCURACY, MATCH, NONE = "wer", "cer", "accuracy", "match", "none"
Metric = Literal["wer", "cer", "accuracy", "match", "none"]
METRICS: dict[Metric, str] = {
    WER: "word error rate",
    CER: "character error rate",
    ACCURACY: "one of several choices, right or wrong",
    MATCH: "whether the reference is found in the answer",
    NONE: "no score; answers are only written down",
}
"""How an answer is scored; manifests use these names."""

WITHOUT_SPACES = frozenset(("zh", "yue", "ja", "th", "lo", "my"))
"""Languages written without spaces between words, whose error rate counts characters (the
published evaluation of Whisper)."""


def parse_language(code: str) -> str:
    """The language of a code such as ``en``, ``zh-CN`` or ``cmn_hans_cn``, in two or three letters.

    Raises DataError for anything else.
    """
    match = re.fullmatch(r"([a-z]{2,3})([-_].+)?", code.strip().lower())
    if match is None:
        raise DataError(f"expected the code of a language, such as 'en' or 'zh', found {code!r}")
    return "zh" if match[1] == "cmn" else match[1]


def error_rate(language: str | None) -> Metric:
    """The usual error rate of transcriptions in a language: of words or of characters."""
    return CER if language in WITHOUT_SPACES else WER


def _as_text(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"expected text, found {value!r}")
    return str(value).strip()


def _as_choices(value: object) -> object:
    texts = value.split(CHOICE_SEPARATOR) if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(t, str) for t in texts):
        raise ValueError(f"expected a list of texts, found {value!r}")
    return tuple(texts)


Text = Annotated[str, BeforeValidator(_as_text)]
Choice = Annotated[str, AfterValidator(str.strip), Field(min_length=1)]
Choices = Annotated[tuple[Choice, ...], BeforeValidator(_as_choices)]
Language = Annotated[str, BeforeValidator(_as_text), AfterValidator(parse_language)]


class RowFacts(PartFields):
    """What any row of an evaluation's manifest may say besides its question.

    Fields that are empty or null count as missing; unknown ones are ignored, unless they may
    select a part of the recording.
    """

    dataset: Text | None = None
    subset: Text = ""
    id: Text | None = Field(None, validation_alias=AliasChoices("id", "index"))
    metric: Annotated[Metric, BeforeValidator(_as_text)] | None = None
    language: Language | None = Field(None, validation_alias=AliasChoices("language", "lang"))
    choices: Choices = ()

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, row: Mapping[str, Any]) -> dict[str, Any]:
        def empty(name: str, value: Any) -> bool:
            blank = isinstance(value, str) and not value.strip()
            return value is None or (blank and name not in QUESTION_FIELDS)

        return {name: value for name, value in row.items() if not empty(name, value)}


class AudioRow(RowFacts):
    """A row with one recording. An empty ``question`` asks nothing; None asks to transcribe."""

    audio: Text = Field(validation_alias=AliasChoices(*AUDIO_FIELDS))
    question: Text | None = Field(None, validation_alias=AliasChoices(*QUESTION_FIELDS))
    reference: Text = Field("", validation_alias=AliasChoices(*REFERENCE_FIELDS))


@contextmanager
def opened(path: Path) -> Iterator[TextIO]:
    """A text file, whose lines keep their ends. Raises DataError, also for what it contains."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield file
    except (OSError, UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def read_rows(path: Path) -> Iterator[tuple[int, dict | DataError]]:
    """The rows of a CSV, TSV or JSON Lines file with their line numbers.

    A line that is not a JSON object, or not as wide as the header, is a DataError with the
    reason. Raises one if the file cannot be read.
    """
    kind = path.suffix.lower()
    if kind not in (".csv", ".tsv", ".jsonl"):
        raise DataError(f"{path}: expected a file .csv, .tsv or .jsonl")
    if kind != ".jsonl":
        yield from read_table(path, tabs=kind == ".tsv")
        return
    with opened(path) as file:
        yield from ((n, _json_row(line)) for n, line in enumerate(file, 1) if line.strip())


def read_table(path: Path, tabs: bool = False) -> Iterator[tuple[int, dict[str, str] | DataError]]:
    """The rows below the header of a CSV file, or one with ``tabs`` and no quotes.

    They come with the numbers of the lines in which they begin. A row that is not as wide as the
    header is a DataError: which of its fields is which cannot be known.

    Raises:
        DataError: the file cannot be read, or two columns have one name.
    """
    csv.field_size_limit(sys.maxsize)
    dialect: Any = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    with opened(path) as file:
        reader = csv.reader(file, **dialect)
        header = next(reader, [])
        for name in header:
            if name and header.count(name) > 1:
                raise DataError(f"{path}: two columns are called {name!r}")
        while True:
            line = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield line, DataError(f"not valid CSV ({error})")
                continue
            if len(fields) == len(header):
                yield line, dict(zip(header, fields, strict=True))
            elif fields:  # an empty line has none
                count = f"{len(fields)} field{'s' if len(fields) > 1 else ''}"
                hint = "" if tabs else "; a text with a comma needs quotes"
                yield line, DataError(f"{count}, the header has {len(header)}{hint}")


def _json_row(line: str) -> dict | DataError:
    try:
        row = json.loads(line)
    except ValueError as error:
        return DataError(f"not valid JSON ({error})")
    return row if isinstance(row, dict) else DataError("expected a JSON object")


def convert_manifest(
    source: Path,
    target: Path,
    audio_root: Path,
    audio_field: str | None = None,
    text_field: str | None = None,
    question_field: str | None = None,
    question: str = QUESTION,
) -> tuple[int, list[str]]:
    """Write a manifest as conversations: a question and a recording, answered by the text.

    Relative paths begin at ``audio_root`` and are written as absolute ones. A part of a recording
    (:class:`~kimia_infer.data.parts.PartFields`) is written as a wav file into the folder
    ``target`` + ``.parts``. Rows that cannot be used, such as those without text or recording,
    are left out. Without a name of the audio or text field, it is the one usual name that
    occurs; without ``question_field``, every row asks ``question``.

    Returns the number of lines written, and the error messages of the rows left out. Raises
    DataError if the manifest cannot be read, or it is unclear which fields to use.
    """
    rows = list(read_rows(source))
    if not rows:
        raise DataError(f"{source}: no rows")
    names = next((list(row) for _, row in rows if isinstance(row, dict)), None)
    if names is None:
        line, error = rows[0]
        raise DataError(f"{source}:{line}: {error}")
    audio_field = _choose(source, names, audio_field, AUDIO_FIELDS, "audio")
    text_field = _choose(source, names, text_field, TEXT_FIELDS, "text")
    if question_field is not None:
        _choose(source, names, question_field, (), "question-field")
    conversations, faults = [], []
    parts = target.with_name(f"{target.name}.parts")
    load = functools.lru_cache(1)(load_audio)  # the next row often uses the same file
    for line, row in progress("Converting", unit="rows", iterable=rows):
        try:
            if isinstance(row, DataError):
                raise row
            audio, text = _value(row, audio_field), _value(row, text_field)
            asked = _value(row, question_field) if question_field else question
            path = (audio_root / audio).resolve()
            if not path.is_file():
                raise DataError(f"{audio_field}: {no_file(path)}")
            path = _recording(row, path, parts / f"{line:08d}.wav", load)
        except (DataError, AudioError) as error:
            faults.append(f"{source}:{line}: {error}")
        except ValidationError as error:
            faults.append(f"{source}:{line}: {'; '.join(explain(error))}")
        else:
            conversations.append(_conversation(asked, str(path), text))
    if not conversations:
        raise DataError(f"{source}: no row can be used; the first: {faults[0]}")
    return write_json_lines(target, conversations), faults


def _recording(row: dict, path: Path, new: Path, load: Callable[[Path], np.ndarray]) -> Path:
    """The recording ``path``, or ``new``, to which the part of it that ``row`` means is written.

    Raises:
        ValidationError, AudioError: the row means no part, or not one of this recording.
    """
    part = PartFields.model_validate(row).part
    if part is None:
        return path
    wave = load(path)
    piece = cut(wave, SAMPLE_RATE, part, str(path))
    if len(wave) - len(piece) <= ROUNDING_SECONDS * SAMPLE_RATE:
        return path
    write_wav(new, piece, SAMPLE_RATE)
    return new.resolve()


def _conversation(question: str, audio: str, text: str) -> dict:
    messages = [("user", "text", question), ("user", "audio", audio), ("assistant", "text", text)]
    keys = ("role", "message_type", "content")
    conversation = [dict(zip(keys, message, strict=True)) for message in messages]
    return {"task_type": UNDERSTANDING, "conversation": conversation}


def _choose(
    source: Path, names: list[str], wanted: str | None, usual: tuple[str, ...], what: str
) -> str:
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
