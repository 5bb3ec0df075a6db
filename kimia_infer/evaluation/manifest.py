"""Manifests of sounds, questions and reference answers (JSONL, CSV, TSV) as items."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kimia_infer.api.transcription import INSTRUCTION
from kimia_infer.data.conversations import DataError, parse_conversation
from kimia_infer.data.manifests import AUDIO_FIELDS, TEXT_FIELDS, read_rows
from kimia_infer.evaluation.choices import index_of
from kimia_infer.evaluation.items import (
    ACCURACY,
    CER,
    METRICS,
    NONE,
    WER,
    EvaluationError,
    Item,
    parse_language,
    sound_of,
)
from kimia_infer.evaluation.normalization import WITHOUT_SPACES

ID_FIELDS = ("id", "index")
LANGUAGE_FIELDS = ("language", "lang")
QUESTION_FIELDS = ("question", "prompt")
REFERENCE_FIELDS = ("reference", *TEXT_FIELDS)
CHOICE_SEPARATOR = "|"
"""Between the choices of a row of a CSV or TSV file."""


@dataclass(frozen=True)
class Defaults:
    """What rows mean that do not say so themselves; ``audio_root`` is where paths begin."""

    audio_root: Path
    metric: str | None = None
    language: str | None = None
    question: str | None = None


@dataclass(frozen=True)
class Manifest:
    """The items of a file, and what is wrong with the lines left out."""

    name: str
    items: list[Item]
    faults: list[str] = field(default_factory=list)


def read_manifest(path: Path, defaults: Defaults) -> Manifest:
    """Read ``path``: rows with a sound and a reference, or conversations as training uses them.

    A row has a sound (``audio``, ``audio_path`` …), a reference (``reference``, ``text``,
    ``answer`` …) unless its metric is none, and may have ``question``, ``choices``, ``metric``,
    ``language``, ``dataset``, ``subset``, ``id``, and ``start`` and ``end`` in seconds. A line
    with ``conversation`` is a chat whose last message, the assistant's, is the reference.

    Raises:
        EvaluationError: the file cannot be read or has no usable line.
    """
    items: list[Item] = []
    faults: list[str] = []
    seen = set()
    try:
        rows = list(read_rows(path))
    except DataError as error:
        raise EvaluationError(str(error)) from error
    for line, row in rows:
        where = f"{path}:{line}"
        try:
            if isinstance(row, DataError):
                raise row
            if path.suffix.lower() != ".jsonl":  # an empty cell says nothing
                row = {name: value for name, value in row.items() if value}
            item = _item(row, line, path.stem, defaults)
            if item.key in seen:
                raise DataError(f"id: {item.id!r} is that of an earlier line")
        except (DataError, EvaluationError) as error:
            faults.append(f"{where}: {error}")
            continue
        seen.add(item.key)
        items.append(item)
    if not items:
        raise EvaluationError(faults[0] if faults else f"{path}: no lines")
    return Manifest(path.stem, items, faults)


def _item(row: dict, line: int, name: str, defaults: Defaults) -> Item:
    build = _conversation if "conversation" in row else _single
    messages, reference, question = build(row, defaults)
    choices = _choices(row.get("choices"))
    language = _text(row, LANGUAGE_FIELDS) or defaults.language
    language = parse_language(language) if language is not None else None
    metric = _metric(row, defaults, language, choices, question is not None)
    if question is None and metric in (WER, CER):
        asked = defaults.question if defaults.question is not None else INSTRUCTION
        messages = [_message("text", asked), *messages]
    item = Item(
        _text(row, ("dataset",)) or name,
        _text(row, ("subset",)) or "",
        _text(row, ID_FIELDS) or str(line),
        metric,
        messages,
        reference,
        language,
        choices,
        _span(row),
    )
    _check(item)
    return item


def _single(row: Mapping[str, Any], defaults: Defaults) -> tuple[list[dict], str, str | None]:
    """The chat, reference and question of a row with one sound."""
    audio = _text(row, AUDIO_FIELDS)
    if audio is None:
        raise DataError(f"audio: missing; one of {', '.join(AUDIO_FIELDS)}")
    question = _text(row, QUESTION_FIELDS, empty=True)
    messages = [_message("text", question)] if question else []
    messages.append(_message("audio", str(_resolve(defaults, audio))))
    return messages, _text(row, REFERENCE_FIELDS) or "", question


def _conversation(row: Mapping[str, Any], defaults: Defaults) -> tuple[list[dict], str, str | None]:
    """The chat and reference of a line of training data; it asks what it asks, no more."""
    parse_conversation(row)
    *chat, last = row["conversation"]
    if last["role"] != "assistant" or last["message_type"] not in ("text", "audio-text"):
        raise DataError(
            "conversation: the last message must be the reference, a text of the assistant"
        )
    if not chat:
        raise DataError("conversation: nothing is asked")
    content = last["content"]
    reference = content if last["message_type"] == "text" else content[1]
    return [_resolved(message, defaults) for message in chat], reference, ""


def _resolved(message: dict[str, Any], defaults: Defaults) -> dict[str, Any]:
    kind, content = message["message_type"], message.get("content")
    sound = sound_of(message)
    if sound is not None:
        path = str(_resolve(defaults, sound))
        content = path if kind == "audio" else [path, message["content"][1]]
    return {"role": message["role"], "message_type": kind, "content": content}


def _resolve(defaults: Defaults, path: str) -> Path:
    return (defaults.audio_root / path).absolute()


def _message(kind: str, content: str) -> dict[str, Any]:
    return {"role": "user", "message_type": kind, "content": content}


def _metric(
    row: Mapping[str, Any],
    defaults: Defaults,
    language: str | None,
    choices: tuple[str, ...],
    asked: bool,
) -> str:
    metric = _text(row, ("metric",)) or defaults.metric
    if metric is not None:
        if metric not in METRICS:
            raise DataError(f"metric: expected one of {', '.join(METRICS)}, found {metric!r}")
        return metric
    if choices:
        return ACCURACY
    if asked:
        raise DataError(
            f"metric: a question and its answer can be scored in several ways; name one of "
            f"{', '.join(METRICS)}"
        )
    return CER if language in WITHOUT_SPACES else WER


def _check(item: Item) -> None:
    if item.metric != NONE and not item.reference:
        raise DataError(
            f"reference: missing or empty; one of {', '.join(REFERENCE_FIELDS)}, or metric 'none'"
        )
    if item.metric in (WER, CER) and item.language is None:
        raise DataError("language: missing; texts are normalized by language, such as 'en'")
    if item.metric == ACCURACY:
        if len(item.choices) < 2:
            raise DataError("choices: expected at least two for metric 'accuracy'")
        try:
            index_of(item.reference, item.choices, item.question, item.language)
        except ValueError as error:
            raise DataError(f"reference: {error}") from error
    if item.span is not None and len(item.sounds) != 1:
        raise DataError("start, end: only a chat with one sound can be cut")


def _choices(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    parts = value.split(CHOICE_SEPARATOR) if isinstance(value, str) else value
    if not isinstance(parts, list) or not all(isinstance(p, str) and p.strip() for p in parts):
        raise DataError(f"choices: expected a list of texts, found {value!r}")
    return tuple(part.strip() for part in parts)


def _span(row: Mapping[str, Any]) -> tuple[float, float] | None:
    if "start" not in row and "end" not in row:
        return None
    try:
        start, end = float(row["start"]), float(row["end"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError("start, end: expected two numbers of seconds") from error
    if not 0 <= start < end:
        raise DataError(f"start, end: {start:g} to {end:g} s is no part of a sound")
    return start, end


def _text(row: Mapping[str, Any], names: Iterable[str], empty: bool = False) -> str | None:
    """The first of the fields that is there, as text; an empty one is missing unless allowed."""
    for name in names:
        value = row.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise DataError(f"{name}: expected text, found {value!r}")
        text = str(value).strip()
        if text or empty:
            return text
    return None
