"""The events of clients."""

from __future__ import annotations

from typing import Any, Literal

import pydantic_core
from pydantic import Field

from kimia_infer.serving.openai.errors import ApiError
from kimia_infer.serving.realtime.schema import Strict, parse


class ClientEvent(Strict):
    type: str
    event_id: str | None = Field(None, max_length=512)


class SessionUpdate(ClientEvent):
    type: Literal["session.update"]
    session: dict[str, Any]


class AppendAudio(ClientEvent):
    type: Literal["input_audio_buffer.append"]
    audio: str


class CommitAudio(ClientEvent):
    type: Literal["input_audio_buffer.commit"]


class ClearAudio(ClientEvent):
    type: Literal["input_audio_buffer.clear"]


class CreateItem(ClientEvent):
    type: Literal["conversation.item.create"]
    item: dict[str, Any]
    previous_item_id: str | None = None


class DeleteItem(ClientEvent):
    type: Literal["conversation.item.delete"]
    item_id: str


class RetrieveItem(ClientEvent):
    type: Literal["conversation.item.retrieve"]
    item_id: str


class TruncateItem(ClientEvent):
    type: Literal["conversation.item.truncate"]
    item_id: str
    content_index: int = Field(ge=0)
    audio_end_ms: int = Field(ge=0)


class CreateResponse(ClientEvent):
    type: Literal["response.create"]
    response: Any = None


class CancelResponse(ClientEvent):
    type: Literal["response.cancel"]
    response_id: str | None = None


KINDS: dict[str, type[ClientEvent]] = {
    kind.model_fields["type"].annotation.__args__[0]: kind  # type: ignore[union-attr]
    for kind in ClientEvent.__subclasses__()
}
"""The events that are known, by type."""

ELSEWHERE = {
    "output_audio_buffer.clear": "only WebRTC has that buffer; truncate the item instead",
}


def decode_message(text: str) -> dict[str, Any]:
    """The object in a frame; raises ApiError for anything else."""
    try:
        value = pydantic_core.from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "expected a JSON object with a type", code="invalid_json")
    return value


def parse_event(value: dict[str, Any]) -> ClientEvent:
    """The event in an object; raises ApiError that names the field."""
    name = value.get("type")
    if not isinstance(name, str):
        raise ApiError(400, "type: missing", "type", "missing_required_parameter")
    if name in ELSEWHERE:
        text = f"type: {name} is not supported; {ELSEWHERE[name]}"
        raise ApiError(400, text, "type", "unsupported_event")
    if name not in KINDS:
        text = f"type: there is no event {name[:100]!r}; known are {', '.join(KINDS)}"
        raise ApiError(400, text, "type", "unknown_event")
    return parse(KINDS[name], value)
