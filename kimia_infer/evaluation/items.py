"""Items of an evaluation, read from manifests (JSON Lines, CSV, TSV)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kimia_infer.api.transcription import INSTRUCTION
from kimia_infer.data.conversations import DataError, parse_conversation
from kimia_infer.data.manifests import (
    ACCURACY,
    CER,
    METRICS,
    NONE,
    REFERENCE_FIELDS,
    WER,
    AudioRow,
    Metric,
    RowFacts,
    error_rate,
    parse_language,
    read_rows,
)
from kimia_infer.data.parts import Part
from kimia_infer.evaluation.texts import index_of
from kimia_infer.models.kimi_audio.prompt import parse_messages
from kimia_infer.utils.errors import explain

Key = tuple[str, str, str]
"""Data set, subset and id, which identify an item in a run."""


@dataclass(frozen=True)
class Item:
    """One question of a data set, and the reference that its answer is compared with.

    ``messages`` is the chat as ``KimiAudio.generate`` takes it. ``choices`` are the possible
    answers of an item scored by accuracy, ``reference`` is one of them. ``span`` is the part of
    the recording that is used; None uses all of it.
    """

    dataset: str
    subset: str
    id: str
    metric: str
    messages: list[dict[str, Any]]
    reference: str
    language: str | None = None
    choices: tuple[str, ...] = ()
    span: Part | None = None

    @property
    def key(self) -> Key:
        return self.dataset, self.subset, self.id

    @property
    def question(self) -> str:
        """The text of the user's last turn."""
        messages = reversed(parse_messages(self.messages))
        turn = [m.text for m in takewhile(lambda m: m.role == "user", messages) if m.text]
        return "\n".join(reversed(turn))

    @property
    def recordings(self) -> dict[int, str]:
        """The audio files of the chat by index of their message."""
        messages = enumerate(parse_messages(self.messages))
        return {index: str(m.audio) for index, m in messages if m.audio is not None}


@dataclass(frozen=True)
class Manifest:
    """The items of a file, and the error messages of the lines that cannot be used."""

    items: list[Item]
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Defaults:
    """Values for rows without their own; ``audio_root`` is where relative paths begin."""

    audio_root: Path
    metric: Metric | None = None
    language: str | None = None
    question: str | None = None


def read_manifest(path: Path, defaults: Defaults) -> Manifest:
    """Read a manifest of rows with a recording and a reference, or of conversations.

    :class:`~kimia_infer.data.manifests.AudioRow` lists the fields of a row. A line with
    ``conversation`` is a chat as in training data, whose last message, the assistant's, is the
    reference. A line that cannot be used is left out; its message names every fault found.

    Raises:
        DataError: the file cannot be read or has no usable line.
    """
    if defaults.language is not None:
        defaults = replace(defaults, language=parse_language(defaults.language))
    items: dict[Key, Item] = {}
    faults: list[str] = []
    for line, row in read_rows(path):
        try:
            if isinstance(row, DataError):
                raise row
            if path.suffix.lower() != ".jsonl":  # an empty cell is a missing value
                row = {name: value for name, value in row.items() if value}
            item = _item(row, line, path.stem, defaults)
            if item.key in items:
                raise DataError(f"id: {item.id!r} was used by an earlier line")
            items[item.key] = item
        except ValidationError as error:
            faults.append(f"{path}:{line}: {'; '.join(explain(error))}")
        except DataError as error:
            faults.append(f"{path}:{line}: {error}")
    if not items:
        raise DataError(faults[0] if faults else f"{path}: no lines")
    return Manifest(list(items.values()), faults)


def _item(row: dict, line: int, name: str, defaults: Defaults) -> Item:
    if "conversation" in row:
        facts = RowFacts.model_validate(row)
        messages, reference = _chat(row, defaults)
        question: str | None = ""
    else:
        facts = single = AudioRow.model_validate(row)
        messages, reference, question = [], single.reference, single.question
        if question:
            messages.append(_user("text", question))
        messages.append(_user("audio", _path(defaults, single.audio)))
    language = facts.language or defaults.language
    metric = facts.metric or defaults.metric
    if metric is None:
        metric = _usual_metric(facts, language, asked=question is not None)
    if question is None and metric in (WER, CER):
        asked = defaults.question if defaults.question is not None else INSTRUCTION
        messages.insert(0, _user("text", asked))
    item = Item(
        facts.dataset or name,
        facts.subset,
        facts.id or str(line),
        metric,
        messages,
        reference,
        language,
        facts.choices,
        facts.part,
    )
    _check(item)
    return item


def _chat(row: Mapping[str, Any], defaults: Defaults) -> tuple[list[dict[str, Any]], str]:
    """The messages before the last one, with absolute paths, and the text of the last one."""
    *chat, last = parse_conversation(row).messages
    if last.role != "assistant" or last.text is None:
        raise DataError(
            "conversation: the last message must be the reference, a text of the assistant"
        )
    if not chat:
        raise DataError("conversation: there is no question")
    messages = []
    for message in chat:
        path = None if message.audio is None else _path(defaults, str(message.audio))
        contents = {"text": message.text, "audio": path, "audio-text": [path, message.text]}
        kind = message.message_type
        content = None if kind is None else contents[kind]
        messages.append({"role": message.role, "message_type": kind, "content": content})
    return messages, last.text


def _path(defaults: Defaults, path: str) -> str:
    return str((defaults.audio_root / path).absolute())


def _user(kind: str, content: str) -> dict[str, Any]:
    return {"role": "user", "message_type": kind, "content": content}


def _usual_metric(facts: RowFacts, language: str | None, asked: bool) -> Metric:
    if facts.choices:
        return ACCURACY
    if asked:
        raise DataError(
            f"metric: a question and its answer can be scored in several ways; name one of "
            f"{', '.join(METRICS)}"
        )
    return error_rate(language)


def _check(item: Item) -> None:
    """Raise DataError naming everything that keeps an item from being scored."""
    faults = []
    if item.metric != NONE and not item.reference:
        faults.append(
            f"reference: missing or empty; give {' or '.join(REFERENCE_FIELDS)}, or metric 'none'"
        )
    if item.metric in (WER, CER) and item.language is None:
        faults.append("language: missing; texts are normalized by language, such as 'en'")
    if item.metric == ACCURACY and len(item.choices) < 2:
        faults.append("choices: expected at least two for metric 'accuracy'")
    elif item.metric == ACCURACY and item.reference:
        try:
            index_of(item.reference, item.choices, item.question, item.language)
        except ValueError as error:
            faults.append(f"reference: {error}")
    if item.span is not None and len(item.recordings) != 1:
        faults.append("start, end, offset, duration: only a chat with one recording can be cut")
    if faults:
        raise DataError("; ".join(faults))
