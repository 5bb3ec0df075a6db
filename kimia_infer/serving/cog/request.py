"""Prediction inputs to a chat, checked again behind the server.

The server validates against the schema file, and lets everything through where that file is
missing. It also hands over what no schema forbids: a plain string where a file is expected,
which would name a file on the server, and whole numbers for floats and the other way round.
"""

from __future__ import annotations

import json
import math
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from kimia_infer.serving.cog.interface import InputField, Interface
from kimia_infer.utils.errors import RequestError

MAX_FILES = 64
"""Files that one list input may hold; the schema cannot say so."""

CHAT_INPUTS = ("task", "audio", "text", "history", "history_audio", "voice")

ResolveAudio = Callable[[str, Any], Any]


def check_inputs(interface: Interface, values: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of ``interface`` taken from ``values``, in range and of the declared type.

    Whole floats become int where an int is declared and ints become float. Files must be
    paths as Cog makes them from an upload, never strings.

    Raises:
        RequestError: naming the input, what is expected and what was found.
    """
    return {field.name: _check(field, values[field.name]) for field in interface.inputs}


def split_inputs(inputs: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The chat that checked inputs stand for, and the inputs that are not part of it.

    The chat is the history and one turn of the user. Within the turn the instruction
    precedes the sound, as in the published examples.

    Raises:
        RequestError: neither text nor sound, a history that cannot be read, or an input that
            does not belong to the task.
    """
    text, audio = inputs["text"], inputs["audio"]
    turn: list[dict[str, Any]] = []
    if text.strip():
        turn.append({"role": "user", "message_type": "text", "content": text})
    if audio is not None:
        turn.append({"role": "user", "message_type": "audio", "content": audio})
    if inputs["task"] == "transcribe":
        _check_transcription(inputs)
    elif not turn:
        raise RequestError("audio, text: nothing to answer; give a sound file, a text or both")
    elif inputs["voice"] is not None and inputs["output_type"] == "text":
        raise RequestError("voice: output_type 'text' has no speech; leave voice out")
    chat = _history(inputs["history"], inputs["history_audio"]) + turn
    return chat, {name: value for name, value in inputs.items() if name not in CHAT_INPUTS}


def _check_transcription(inputs: Mapping[str, Any]) -> None:
    if inputs["audio"] is None:
        raise RequestError("audio: nothing to transcribe; give a sound file")
    for name in ("history", "history_audio", "voice"):
        if inputs[name]:
            raise RequestError(f"{name}: a transcription has none; leave it out")


def name_files(message: str, inputs: Mapping[str, Any]) -> str:
    """``message`` with the temporary paths of uploads replaced by the names of their inputs."""
    files = {name: inputs[name] for name in ("audio", "voice") if inputs[name] is not None}
    files |= {f"history_audio[{i}]": path for i, path in enumerate(inputs["history_audio"])}
    for name, path in files.items():
        message = message.replace(str(path), name)
    return message


def name_messages(message: str, inputs: Mapping[str, Any]) -> str:
    """``message`` with the messages of the chat, ``chats[1]``, called as the inputs they are."""
    turn = ["text"] if inputs["text"].strip() or inputs["task"] == "transcribe" else []
    turn += ["audio"] if inputs["audio"] is not None else []
    earlier = len(json.loads(inputs["history"])) if inputs["history"].strip() else 0

    def name(match: re.Match[str]) -> str:
        place = int(match[1]) - earlier
        if place < 0:
            return f"history[{match[1]}]{match[2] or ''}"
        return turn[place] if place < len(turn) else match[0]

    # An upload is named by its path, for which name_files puts the input.
    message = re.sub(r"^chats\[\d{1,6}\]\.content: (?=/)", "", message)
    message = re.sub(r"\bchats\[(\d{1,6})\](\.content\b)?", name, message)
    return re.sub(r"^chats: ", "audio, text, history: ", message)


def parse_history(text: str, resolve: ResolveAudio) -> list[dict[str, Any]]:
    """Messages from JSON: a list of ``{"role", "message_type", "content"}``.

    Every reference to a sound is replaced by ``resolve(where, reference)``; ``where`` names
    its place for messages. The content of a message is checked no further than is needed to
    find the references.
    """
    try:
        messages = json.loads(text)
        # Half a surrogate pair is valid JSON, but no text that can be encoded.
        json.dumps(messages, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise RequestError(f"history: not valid JSON ({error})") from error
    if not isinstance(messages, list):
        raise RequestError(f"history: expected a JSON list of messages, found {_show(messages)}")
    return [
        _message(f"history[{index}]", message, resolve) for index, message in enumerate(messages)
    ]


def _message(where: str, message: Any, resolve: ResolveAudio) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise RequestError(
            f"{where}: expected an object with role, message_type and content, "
            f"found {_show(message)}"
        )
    if unknown := message.keys() - {"role", "message_type", "content"}:
        raise RequestError(f"{where}: unknown field {_show(min(unknown))}")
    content = message.get("content")
    if message.get("message_type") == "audio":
        content = resolve(f"{where}.content", content)
    elif message.get("message_type") == "audio-text" and isinstance(content, list) and content:
        content = [resolve(f"{where}.content[0]", content[0]), *content[1:]]
    return message | {"content": content}


def _history(text: str, files: list[pathlib.Path]) -> list[dict[str, Any]]:
    """The history of a request; its sounds are places in ``files``, counted from 0."""
    used: set[int] = set()

    def resolve(where: str, reference: Any) -> pathlib.Path:
        if type(reference) is not int or not 0 <= reference < len(files):
            known = f"0 to {len(files) - 1}" if files else "none: history_audio is empty"
            raise RequestError(
                f"{where}: expected the place of a file in history_audio ({known}), "
                f"found {_show(reference)}"
            )
        used.add(reference)
        return files[reference]

    messages = parse_history(text, resolve) if text.strip() else []
    if unused := set(range(len(files))) - used:
        raise RequestError(f"history_audio[{min(unused)}]: no message of history refers to it")
    return messages


def _check(field: InputField, value: Any) -> Any:
    if value is None:
        if field.required or not (field.nullable or field.default is None):
            raise RequestError(f"{field.name}: expected {_expected(field)}, found null")
        return None
    if not field.repeated:
        return _check_one(field, field.name, value)
    if not isinstance(value, list):
        raise RequestError(f"{field.name}: expected a list, found {_show(value)}")
    if len(value) > MAX_FILES:
        raise RequestError(f"{field.name}: expected at most {MAX_FILES} files, found {len(value)}")
    return [_check_one(field, f"{field.name}[{i}]", item) for i, item in enumerate(value)]


def _check_one(field: InputField, where: str, value: Any) -> Any:
    if field.kind == "Path":
        if not isinstance(value, pathlib.Path):
            raise RequestError(
                f"{where}: expected an uploaded file (a data URI or an http(s) URL), found "
                f"{_show(value)}; paths on the server are not opened"
            )
        return value
    converted = _convert(field.kind, value)
    if converted is None or not _allowed(field, converted):
        raise RequestError(f"{where}: expected {_expected(field)}, found {_show(value)}")
    return converted


def _convert(kind: str, value: Any) -> str | int | float | None:
    """``value`` as what the input declares; None where it is something else."""
    if kind == "str":
        return value if isinstance(value, str) and _is_text(value) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    if kind == "int":
        return int(value) if number.is_integer() else None
    return number if math.isfinite(number) else None


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _allowed(field: InputField, value: str | int | float) -> bool:
    if field.choices is not None:
        return value in field.choices
    if isinstance(value, str):
        low, high, value = field.min_length, field.max_length, len(value)
    else:
        low, high = field.ge, field.le
    return (low is None or low <= value) and (high is None or value <= high)


def _expected(field: InputField) -> str:
    """What an input may be, in words: ``a number from 0 to 2``."""
    if field.choices is not None:
        return "one of " + ", ".join(map(repr, field.choices))
    if field.kind == "str":
        return "text" + _range(field.min_length, field.max_length, " characters")
    noun = {"int": "a whole number", "float": "a number", "Path": "an uploaded file"}[field.kind]
    return noun + _range(field.ge, field.le)


def _range(low: float | None, high: float | None, unit: str = "") -> str:
    bounds = [f"at least {low}"] if low is not None else []
    bounds += [f"at most {high}"] if high is not None else []
    return f" of {' and '.join(bounds)}{unit}" if bounds else ""


def _show(value: Any) -> str:
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
