"""Training data in the published format: one conversation per line of a JSON Lines file.

A line is ``{"task_type": ..., "conversation": [messages]}``. Messages are those of a chat. A
message with audio may have ``audio_tokens``: its speech codes as ids of the language model
(code + ``kimia_token_offset``), as the published code extraction writes them.
"""

from __future__ import annotations

import json
import os
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kimia_infer.data.parts import selects_sound
from kimia_infer.models.kimi_audio.prompt import Message, parse_messages
from kimia_infer.utils.errors import RequestError

UNDERSTANDING = "understanding"
"""The task type whose answers are text only (published fine-tuning code)."""

AUDIO_TYPES = ("audio", "audio-text")


class DataError(ValueError):
    """Data cannot be used; the message names file, line and field."""


@dataclass(frozen=True)
class Conversation:
    """One line: its validated messages, and audio ids by index of the messages that have them."""

    task_type: str
    messages: list[Message]
    audio_ids: dict[int, list[int]] = field(default_factory=dict)

    @property
    def output_type(self) -> str:
        """The output type of the prompt: "text" for understanding, "both" for other tasks."""
        return "text" if self.task_type == UNDERSTANDING else "both"


def audio_field(index: int, message_type: str | None) -> str:
    """The name of the audio of message ``index`` in error messages."""
    return f"conversation[{index}].content" + ("[0]" if message_type == "audio-text" else "")


def parse_conversation(values: Any) -> Conversation:
    """Validate the object of a line.

    Raises:
        DataError: a field is missing, unknown or empty; the message begins with its name.
    """
    if not isinstance(values, dict):
        raise DataError("expected an object with task_type and conversation")
    task_type = values.get("task_type")
    if not isinstance(task_type, str) or not task_type:
        raise DataError(f"task_type: expected a name such as {UNDERSTANDING!r}, got {task_type!r}")
    chats = values.get("conversation")
    if not isinstance(chats, list) or not chats:
        raise DataError("conversation: expected a list with at least one message")
    try:
        messages = parse_messages(chats)
    except RequestError as error:
        # Requests call the list "chats".
        raise DataError(str(error).replace("chats", "conversation", 1)) from error
    audio_ids = {}
    for index, (message, raw) in enumerate(zip(messages, chats, strict=True)):
        if message.text is not None and not message.text.strip():
            element = "[1]" if message.message_type == "audio-text" else ""
            raise DataError(f"conversation[{index}].content{element}: the text is empty")
        _refuse_parts(f"conversation[{index}].", raw)
        if isinstance(message.audio, bytes):  # a JSON object with samples
            where = audio_field(index, message.message_type)
            raise DataError(f"{where}: expected the path of an audio file")
        if "audio_tokens" in raw:
            audio_ids[index] = _audio_tokens(f"conversation[{index}].audio_tokens", message, raw)
    return Conversation(task_type, messages, audio_ids)


def _refuse_parts(where: str, values: dict) -> None:
    """Raise DataError for a field that selects a part of a recording."""
    for name, value in values.items():
        if selects_sound(name, value):
            raise DataError(
                f"{where}{name}: conversations use whole recordings; cut the recording, or remove "
                "the field"
            )


def _audio_tokens(where: str, message: Message, raw: dict) -> list[int]:
    tokens = raw["audio_tokens"]
    if message.message_type not in AUDIO_TYPES:
        raise DataError(f"{where}: only messages of type 'audio' and 'audio-text' have codes")
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise DataError(f"{where}: expected a list of ids")
    if not tokens:
        raise DataError(f"{where}: empty, as after a failed extraction; extract the codes again")
    return tokens


class ConversationFile:
    """The lines of a JSON Lines file, parsed on access; empty lines are skipped.

    Only the offsets of the lines are kept in memory. Raises DataError if there are no lines.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._starts, self._numbers = array("q"), array("q")
        try:
            with self.path.open("rb") as file:
                start = 0
                for number, line in enumerate(file, 1):
                    if line.strip():
                        self._starts.append(start)
                        self._numbers.append(number)
                    start += len(line)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror})") from error
        if not self._starts:
            raise DataError(f"{self.path}: no lines")

    def __len__(self) -> int:
        return len(self._starts)

    def line_number(self, index: int) -> int:
        return self._numbers[index]

    def where(self, index: int) -> str:
        """``file:line``, with which error messages begin."""
        return f"{self.path}:{self._numbers[index]}"

    def raw(self, index: int) -> Any:
        """The JSON value of a line. Raises DataError."""
        with self.path.open("rb") as file:
            file.seek(self._starts[index])
            line = file.readline()
        try:
            return json.loads(line)
        except ValueError as error:
            raise DataError(f"{self.where(index)}: not valid JSON ({error})") from error

    def parse(self, index: int, values: Any) -> Conversation:
        """:func:`parse_conversation`, with file and line in its errors."""
        try:
            conversation = parse_conversation(values)
            _refuse_parts("", values)
            return conversation
        except DataError as error:
            raise DataError(f"{self.where(index)}: {error}") from error

    def __getitem__(self, index: int) -> Conversation:
        return self.parse(index, self.raw(index))
