"""Chat messages as callers write them, validated."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kimia_infer.utils.errors import RequestError

ROLES = ("user", "assistant")
MESSAGE_TYPES = ("text", "audio", "audio-text", None)

AudioSource = str | os.PathLike | bytes


@dataclass(frozen=True)
class Message:
    """One validated message; ``text`` and ``audio`` are set as its type demands.

    ``message_type`` None is a message without content, as the published format allows.
    """

    role: str
    message_type: str | None
    text: str | None = None
    audio: AudioSource | None = None


def parse_messages(chats: Any) -> list[Message]:
    """Validate the published message format: dictionaries with role, message_type, content.

    Content is a string for ``text``, an audio file path or the file's bytes for ``audio``
    and ``[audio, text]`` for ``audio-text``. Raises RequestError naming message and field.
    """
    if isinstance(chats, str | bytes | dict) or not isinstance(chats, Sequence):
        raise RequestError("chats: expected a list of messages")
    return [_parse(f"chats[{index}]", message) for index, message in enumerate(chats)]


def _parse(where: str, message: Any) -> Message:
    if not isinstance(message, dict):
        raise RequestError(f"{where}: expected a dictionary with role, message_type and content")
    role = message.get("role")
    if role not in ROLES:
        hint = " (Kimi-Audio has no system role)" if role == "system" else ""
        raise RequestError(
            f"{where}.role: expected 'user' or 'assistant', found {_show(role)}{hint}"
        )
    if "message_type" not in message:
        raise RequestError(f"{where}.message_type: missing; use 'text', 'audio' or 'audio-text'")
    kind, content = message["message_type"], message.get("content")
    if kind is None:
        return Message(role, None)
    if kind == "text":
        return Message(role, kind, text=_text(f"{where}.content", content))
    if kind == "audio":
        return Message(role, kind, audio=_audio(f"{where}.content", content))
    if kind == "audio-text":
        if not isinstance(content, list | tuple) or len(content) != 2:
            raise RequestError(f"{where}.content: expected [audio, text] for 'audio-text'")
        audio = _audio(f"{where}.content[0]", content[0])
        return Message(role, kind, text=_text(f"{where}.content[1]", content[1]), audio=audio)
    raise RequestError(
        f"{where}.message_type: expected 'text', 'audio' or 'audio-text', found {_show(kind)}"
    )


def _show(value: Any) -> str:
    """What was found, in few characters however long or nested it is."""
    return reprlib.repr(value)


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{where}: expected text, found {type(value).__name__}")
    return value


def _audio(where: str, value: Any) -> AudioSource:
    if not isinstance(value, AudioSource):
        raise RequestError(
            f"{where}: expected an audio file path or its bytes, found {type(value).__name__}"
        )
    return value
