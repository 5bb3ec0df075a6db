"""Messages of chat completions, and the chat that the model reads of them."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from kimia_infer.serving.openai.errors import ApiError, unsupported
from kimia_infer.serving.openai.replies import Replies
from kimia_infer.utils.errors import suggest

MOST_SOUNDS = 64
"""Recordings and replies in the messages of a request."""

MOST_TEXT = 200_000
"""Characters in the messages of a request; far fewer fill all that the model can read."""

INSTRUCTING = ("system", "developer")

DATA_URI = re.compile(r"\A\s*data:[^,]{0,200};base64,", re.IGNORECASE)
"""What stands before the base64 of a data URI."""


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class InputAudio(Strict):
    """A recording in base64; its format is recognized by its content."""

    data: str
    format: Literal["wav", "mp3", "flac", "ogg", "opus", "m4a", "mp4", "aac", "webm"]


class Part(BaseModel):
    """A piece of a message: its field of the name of its type is set."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text", "input_audio", "refusal"]
    text: str | None = None
    input_audio: InputAudio | None = None
    refusal: str | None = None
    prompt_cache_breakpoint: Any = Field(None, description="Not used")


class SpokenReply(BaseModel):
    """An earlier reply by its id; what else came with it is known here."""

    id: str


def _as_parts(value: Any) -> Any:
    """A plain text is one part, and nothing is none."""
    if value is None:
        return []
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


Content = Annotated[
    list[Part], BeforeValidator(_as_parts, json_schema_input_type=str | list[Part] | None)
]


class Message(BaseModel):
    """A message; the model has users and one assistant, and knows no names.

    It may be one that a client got as an answer and sends back as it is.
    """

    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: Content = Field(default_factory=list)
    audio: SpokenReply | None = Field(None, description="An earlier reply of the assistant")


SENT_BACK = {"name", "refusal", "annotations", "parsed", "reasoning_content"}
"""Further fields of messages that change nothing here."""


@dataclass
class Chat:
    """Messages as the model takes them, each with the place in the request that it comes from."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    places: list[str] = field(default_factory=list)

    def add(self, place: str, role: str, kind: str, content: Any) -> None:
        self.messages.append({"role": role, "message_type": kind, "content": content})
        self.places.append(place)

    def named(self, message: str) -> str:
        """``message`` with the model's names of messages, ``chats[1].content``, replaced."""

        def name(match: re.Match[str]) -> str:
            index = int(match[1])
            return self.places[index] if index < len(self.places) else match[0]

        message = re.sub(r"\bchats\[(\d{1,6})\](\.content(\[\d\])?)?", name, message)
        return re.sub(r"\bchats: ", "messages: ", message)


def read_messages(messages: Sequence[Message], replies: Replies) -> Chat:
    """The chat of a request.

    What the system says becomes text of the user before what follows, since the model was trained
    with instructions there and has no role for them. A reply is its sound with its words, or its
    words alone if it was cut before they were said.

    Raises ApiError naming the message and the part.
    """
    chat = Chat()
    if messages and messages[-1].role == "assistant":
        raise ApiError(
            400, "messages: the last one is the assistant's; nothing is asked", "messages"
        )
    for index, message in enumerate(messages):
        place = f"messages[{index}]"
        _check_extras(place, message)
        if message.audio is not None:
            _add_reply(chat, place, message, replies)
            continue
        for number, part in enumerate(message.content):
            _add_part(chat, f"{place}.content[{number}]", message.role, part)
    _check_size(chat)
    return chat


def _check_extras(place: str, message: Message) -> None:
    for name, value in (message.model_extra or {}).items():
        if value in (None, [], {}) or name in SENT_BACK:
            continue
        if name in ("tool_calls", "tool_call_id", "function_call"):
            raise unsupported(f"{place}.{name}", "the model calls no tools")
        near = suggest(name, Message.model_fields, f"{place}.")
        raise ApiError(400, f"{place}.{name}: unknown field{near}", f"{place}.{name}")


def _add_reply(chat: Chat, place: str, message: Message, replies: Replies) -> None:
    assert message.audio is not None
    if message.role != "assistant":
        text = f"{place}.audio: only the assistant's messages refer to replies"
        raise ApiError(400, text, f"{place}.audio")
    if any(part.text for part in message.content):
        text = f"{place}.content: leave it out beside audio, whose words are known here"
        raise ApiError(400, text, f"{place}.content")
    reply = replies.find(message.audio.id, f"{place}.audio.id")
    if reply.wav is None:
        chat.add(f"{place}.audio", "assistant", "text", reply.transcript)
    else:
        chat.add(f"{place}.audio", "assistant", "audio-text", [reply.wav, reply.transcript])


def _add_part(chat: Chat, place: str, role: str, part: Part) -> None:
    value = getattr(part, part.type)
    if value is None:
        raise ApiError(400, f"{place}.{part.type}: missing", f"{place}.{part.type}")
    if isinstance(value, InputAudio):
        if role != "user":
            text = f"{place}.type: only users send input_audio"
            raise ApiError(400, text, f"{place}.type")
        param = f"{place}.input_audio.data"
        chat.add(param, "user", "audio", decode_base64(value.data, param))
        return
    who = "user" if role in INSTRUCTING else role
    chat.add(f"{place}.{part.type}", who, "text", value)


def decode_base64(data: str, param: str) -> bytes:
    """The bytes in ``data``, which may have line breaks and be a data URI.

    Raises ApiError naming ``param`` if they are not base64.
    """
    try:
        return base64.b64decode("".join(DATA_URI.sub("", data, 1).split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(
            400,
            f"{param}: not base64 ({error}); encode the bytes of the sound",
            param,
            "invalid_value",
        ) from error


def _check_size(chat: Chat) -> None:
    texts = [m["content"][-1] if m["message_type"] == "audio-text" else m["content"]
             for m in chat.messages if m["message_type"] != "audio"]  # fmt: skip
    if sum(map(len, texts)) > MOST_TEXT:
        text = f"messages: more than {MOST_TEXT} characters; send less history"
        raise ApiError(400, text, "messages", "context_length_exceeded")
    if sum(m["message_type"] != "text" for m in chat.messages) > MOST_SOUNDS:
        text = f"messages: more than {MOST_SOUNDS} recordings and replies; send less history"
        raise ApiError(400, text, "messages", "context_length_exceeded")
