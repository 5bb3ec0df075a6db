"""What is wrong or not supported is named, and the session goes on."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.resources.realtime.realtime import RealtimeConnection
from websockets.sync.client import connect

from tests.serving.helpers import Server
from tests.serving.realtime.talk import ASKED, answer, encoded, manual, refusal, say, transcript


@pytest.fixture(scope="module")
def session(client: openai.OpenAI) -> Iterator[RealtimeConnection]:
    """One session, which all these events do not end."""
    with manual(client, output_modalities=["text"]) as session:
        yield session
        say(session)
        assert transcript(answer(session)) == "nine"


INPUT: Any = {"type": "message", "role": "user", "content": []}
UNSUPPORTED: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "function", "name": "f"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"type": "transcription"}, "type"),
    ({"include": ["item.input_audio_transcription.logprobs"]}, "include"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt"),
    ({"reasoning": {"effort": "low"}}, "reasoning"),
    ({"audio": {"output": {"speed": 1.5}}}, "audio.output.speed"),
    ({"audio": {"output": {"format": {"type": "audio/pcmu"}}}}, "audio.output.format.type"),
    ({"audio": {"input": {"format": {"type": "audio/pcma"}}}}, "audio.input.format.type"),
    ({"audio": {"input": {"noise_reduction": {}}}}, "audio.input.noise_reduction"),
    (
        {"audio": {"input": {"turn_detection": {"type": "other_vad"}}}},
        "audio.input.turn_detection.type",
    ),
    (
        {"audio": {"input": {"transcription": {"keywords": ["a"]}}}},
        "audio.input.transcription.keywords",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("change", "path"), UNSUPPORTED, ids=[path for _, path in UNSUPPORTED])
def test_what_the_model_cannot_do_is_named(
    session: RealtimeConnection, change: dict[str, Any], path: str
) -> None:
    session.session.update(session={"type": "realtime", **change}, event_id=f"of {path}")
    error = refusal(session)
    assert (error.code, error.param) == ("unsupported_parameter", f"session.{path}")
    assert error.message.startswith(f"session.{path}: not supported; ")
    assert error.event_id == f"of {path}"


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"output_modalities": ["audio", "text"]}, "output_modalities"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"truncation": {"type": "retention_ratio", "retention_ratio": 2}}, "truncation"),
    ({"instructions": "a" * 100_001}, "instructions"),
    ({"temperature": 0.8}, "temperature"),
    ({"model": "gpt-realtime"}, "model"),
    ({"audio": {"input": {"format": {"rate": 16_000}}}}, "audio.input.format.rate"),
    ({"audio": {"output": {"voice": "nobody"}}}, "audio.output.voice"),
    (
        {"audio": {"input": {"transcription": {"language": "fr"}}}},
        "audio.input.transcription.language",
    ),
    ({"audio": {"input": {"transcription": {"model": "x"}}}}, "audio.input.transcription.model"),
    (
        {"audio": {"input": {"turn_detection": {"type": "server_vad", "threshold": 2}}}},
        "audio.input.turn_detection.threshold",
    ),
    (
        {"audio": {"input": {"turn_detection": {"type": "semantic_vad", "eagerness": "very"}}}},
        "audio.input.turn_detection",
    ),
    (
        {"audio": {"input": {"turn_detection": {"type": "server_vad", "idle_timeout_ms": 1}}}},
        "audio.input.turn_detection.idle_timeout_ms",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("change", "path"), WRONG, ids=[path for _, path in WRONG])
def test_wrong_settings_are_named(
    session: RealtimeConnection, change: dict[str, Any], path: str
) -> None:
    session.session.update(session={"type": "realtime", **change})
    error = refusal(session)
    assert error.param == f"session.{path}" and error.message.startswith(f"session.{path}: ")
    assert error.type in ("invalid_request_error", "not_found_error")


def item(*content: Any, role: str = "user", **fields: Any) -> dict[str, Any]:
    message = {"type": "message", "role": role, "content": list(content), **fields}
    return {"type": "conversation.item.create", "item": message}


def append(audio: Any) -> dict[str, Any]:
    return {"type": "input_audio_buffer.append", "audio": audio}


def respond(**fields: Any) -> dict[str, Any]:
    return {"type": "response.create", "response": fields}


EVENTS: list[tuple[Any, str | None]] = [
    ({"session": {}}, "type"),
    ({"type": "session.update", "session": {}}, "session.type"),
    ({"type": "session.update", "session": []}, "session"),
    ({"type": "response.creat"}, "type"),
    ({"type": "output_audio_buffer.clear"}, "type"),
    ({"type": "input_audio_buffer.append"}, "audio"),
    (append(1), "audio"),
    (append("not base64!"), "audio"),
    (append(encoded(b"odd")), "audio"),
    (append(encoded(bytes(2 * 24_000 * 61))), "audio"),
    ({"type": "input_audio_buffer.commit"}, None),
    ({"type": "input_audio_buffer.clear", "all": True}, "all"),
    ({"type": "response.cancel", "event_id": 1}, "event_id"),
    (item(), "item.content"),
    (item({"type": "input_image", "image_url": "data:,"}), "item.content[0].image_url"),
    (item({"type": "input_image"}), "item.content[0].type"),
    (item({"type": "output_audio", "audio": "AAAA"}, role="assistant"), "item.content[0].type"),
    (item({"type": "input_audio", "audio": "AAA="}, role="system"), "item.content[0].type"),
    (item({"type": "input_audio"}), "item.content[0].audio"),
    (item({"type": "input_audio", "audio": ""}), "item.content[0].audio"),
    (item({"type": "input_audio", "audio": encoded(b"odd")}), "item.content[0].audio"),
    (item({"type": "input_text", "audio": "AAAA"}), "item.content[0].text"),
    (item({"type": "input_text", "text": "a"}, role="tool"), "item.role"),
    (item({"type": "input_text", "text": "a"}, id=""), "item.id"),
    (item({"type": "input_text", "text": "a"}) | {"previous_item_id": "x"}, "previous_item_id"),
    ({"type": "conversation.item.create", "item": {"type": "function_call_output"}}, "item.type"),
    ({"type": "conversation.item.delete", "item_id": "x"}, "item_id"),
    ({"type": "conversation.item.retrieve", "item_id": "x"}, "item_id"),
    ({"type": "response.create", "response": []}, "response"),
    (respond(voice="alloy"), "response.voice"),
    (respond(tools=[{}]), "response.tools"),
    (respond(metadata={"a": 1}), "response.metadata.a"),
    (respond(metadata={"a" * 65: ""}), "response.metadata"),
    (respond(input=[{"type": "message"}]), "response.input[0].role"),
    (respond(input=[{"type": "item_reference", "id": "x"}]), "response.input[0].id"),
]  # fmt: skip


@pytest.mark.parametrize(("event", "param"), EVENTS)
def test_wrong_events_are_named(
    session: RealtimeConnection, event: dict[str, Any], param: str | None
) -> None:
    session.send_raw(json.dumps({"event_id": "mine", **event}))
    error = refusal(session)
    assert error.param == param
    assert param is None or param in error.message
    if event.get("event_id") is None:
        assert error.event_id == "mine"


FRAMES = [
    (b"{}", "binary frames are not read"),
    ("", "not valid JSON"),
    ("{", "not valid JSON"),
    ("[]", "expected a JSON object"),
    ('"text"', "expected a JSON object"),
    ("[" * 100_000, "not valid JSON"),
    ('{"type": NaN}', "not valid JSON"),
    ('{"type": "response.cancel", "event_id": "\\ud800"}', "not valid JSON"),
    ("1" * 10_000, "not valid JSON"),
]


def test_frames_that_are_no_events_are_answered(front: Server) -> None:
    with connect(f"{front.url.replace('http', 'ws')}/v1/realtime") as socket:
        assert json.loads(socket.recv())["type"] == "session.created"
        for frame, message in FRAMES:
            socket.send(frame)
            event = json.loads(socket.recv())
            assert event["type"] == "error" and event["event_id"]
            assert event["error"]["message"].startswith(message)
        content = base64.encodebytes(ASKED).decode()  # with line breaks
        socket.send(json.dumps({"type": "input_audio_buffer.append", "audio": content}))
        assert json.loads(socket.recv())["type"] == "input_audio_buffer.speech_started"
