"""The items of a conversation: what was said and written, in order."""

from __future__ import annotations

import base64
import secrets
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from kimia_infer.serving.openai.errors import ApiError, unsupported
from kimia_infer.serving.realtime.config import Text
from kimia_infer.serving.realtime.schema import SAMPLE_BYTES, Strict, decode_sound, parse

MAX_ITEMS = 1_000
"""Items that a conversation can have."""

MAX_SOUND = 30_000_000
"""Bytes of sound that a conversation keeps, ten minutes: as much as the longest prompt holds."""

Role = Literal["user", "assistant", "system"]
Kind = Literal["input_text", "input_audio", "output_text", "output_audio"]


def new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(10)}"


@dataclass(eq=False)
class Part:
    """Text, or sound (int16 samples at 24 kHz, as bytes) and what is said in it as far as known."""

    kind: Kind
    text: str | None = None
    sound: bytes = b""

    @property
    def is_sound(self) -> bool:
        return self.kind in ("input_audio", "output_audio")

    @property
    def samples(self) -> int:
        return len(self.sound) // SAMPLE_BYTES

    def described(self, with_sound: bool) -> dict[str, Any]:
        if not self.is_sound:
            return {"type": self.kind, "text": self.text or ""}
        sound = {"audio": base64.b64encode(self.sound).decode()} if with_sound else {}
        return {"type": self.kind, "transcript": self.text, **sound}


@dataclass(eq=False)
class Item:
    """One message. An ``incomplete`` one was stopped, or not heard to its end."""

    role: Role
    parts: list[Part]
    id: str = field(default_factory=lambda: new_id("item"))
    status: Literal["in_progress", "completed", "incomplete"] = "completed"

    def described(self, with_sound: bool = False) -> dict[str, Any]:
        """The item as events show it."""
        return {
            "id": self.id,
            "object": "realtime.item",
            "type": "message",
            "status": self.status,
            "role": self.role,
            "content": [part.described(with_sound) for part in self.parts],
        }


class Conversation:
    """Items in order."""

    def __init__(self) -> None:
        self.id = new_id("conv")
        self.items: list[Item] = []

    def add(self, item: Item, after: str | None = None) -> str | None:
        """Insert ``item`` at the end or behind ``after``, ``"root"`` for the beginning.

        Returns the id of the item before it. Raises ApiError for an id that is taken, for an
        unknown ``after``, and for too many items.
        """
        if any(other.id == item.id for other in self.items):
            raise ApiError(400, f"item.id: there is an item {item.id!r}", "item.id", "id_taken")
        if len(self.items) >= MAX_ITEMS:
            text = f"item: the conversation has {MAX_ITEMS} items, the most here; delete some"
            raise ApiError(400, text, "item", "conversation_full")
        place = len(self.items)
        if after is not None:
            place = 0 if after == "root" else self._index(after, "previous_item_id") + 1
        self.items.insert(place, item)
        self.forget_sound()
        return self.items[place - 1].id if place else None

    def find(self, item_id: str, param: str = "item_id") -> Item:
        return self.items[self._index(item_id, param)]

    def before(self, item: Item) -> str | None:
        """The id of the item before ``item``."""
        place = self.items.index(item)
        return self.items[place - 1].id if place else None

    def delete(self, item_id: str) -> None:
        del self.items[self._index(item_id, "item_id")]

    def forget_sound(self) -> None:
        """Forget the oldest sound where there is more than any prompt holds."""
        total = sum(len(part.sound) for item in self.items for part in item.parts)
        for item in self.items:
            for part in item.parts:
                if total <= MAX_SOUND:
                    return
                total -= len(part.sound)
                part.sound = b""

    def _index(self, item_id: str, param: str) -> int:
        for place, item in enumerate(self.items):
            if item.id == item_id:
                return place
        text = f"{param}: the conversation has no item {item_id[:100]!r}"
        raise ApiError(400, text, param, "item_not_found")


class _Content(Strict):
    type: str
    text: Text | None = None
    audio: str | None = None
    transcript: Text | None = None


class _Message(Strict):
    type: Literal["message"]
    role: Role
    content: Annotated[list[_Content], Field(min_length=1, max_length=100)]
    id: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    object: Literal["realtime.item"] | None = None
    status: Literal["completed", "incomplete", "in_progress"] | None = None


KINDS_OF: dict[Role, dict[str, Kind]] = {
    "user": {"input_text": "input_text", "input_audio": "input_audio"},
    "system": {"input_text": "input_text"},
    "assistant": {"output_text": "output_text"},
}
"""What messages of clients may hold, by role."""


def parse_item(value: Any, where: str = "item") -> Item:
    """An item as a client sends it; raises ApiError that names the field below ``where``."""
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind != "message":
        raise unsupported(f"{where}.type", "only messages are; the model calls no tools")
    message = parse(_Message, value, where)
    parts = [
        _parse_part(content, message.role, f"{where}.content[{index}]")
        for index, content in enumerate(message.content)
    ]
    status = "incomplete" if message.status == "incomplete" else "completed"
    return Item(message.role, parts, message.id or new_id("item"), status)


def _parse_part(content: _Content, role: Role, where: str) -> Part:
    kind = KINDS_OF[role].get(content.type)
    if kind is None:
        known = " or ".join(map(repr, KINDS_OF[role]))
        raise unsupported(f"{where}.type", f"messages of the {role} have {known}")
    field_name, other = ("audio", "text") if kind == "input_audio" else ("text", "audio")
    if getattr(content, field_name) is None:
        param = f"{where}.{field_name}"
        raise ApiError(400, f"{param}: missing", param, "missing_required_parameter")
    if getattr(content, other) is not None:
        param = f"{where}.{other}"
        raise ApiError(400, f"{param}: not for {kind}", param, "invalid_value")
    if kind != "input_audio":
        return Part(kind, content.text)
    sound = decode_sound(content.audio or "", f"{where}.audio")
    if not sound:
        raise ApiError(400, f"{where}.audio: empty", f"{where}.audio", "invalid_value")
    return Part(kind, content.transcript, sound)
