"""Answers that are interrupted, and what the model remembers of them."""

from __future__ import annotations

import base64
from typing import Any

import openai
import pytest
from openai.resources.realtime.realtime import RealtimeConnection

from tests.serving.realtime.talk import (
    ASKED,
    MODEL,
    RATE,
    answer,
    configure,
    manual,
    of,
    refusal,
    say,
    silence,
    stream,
    transcript,
    until,
    write,
)

SENTENCES = ("the green lamp is in the kitchen", "take the red ball to the school")
LONG = f"Please read aloud: {' '.join(SENTENCES * 3)}"
"""The miniature reads something of this for several seconds."""


def begin_long(session: RealtimeConnection) -> list[Any]:
    """Ask for a long answer; the events up to its first sound."""
    write(session, LONG)
    session.response.create()
    return until(session, "response.output_audio.delta")


def retrieved(session: RealtimeConnection, item_id: str) -> tuple[Any, bytes]:
    """An item as the server has it, and its sound."""
    session.conversation.item.retrieve(item_id=item_id)
    item = until(session, "conversation.item.retrieved")[-1].item
    return item, base64.b64decode(item.content[0].audio)


def test_a_voice_interrupts_an_answer(client: openai.OpenAI) -> None:
    with client.realtime.connect(model=MODEL) as session:
        session.recv()
        begun = begin_long(session)
        stream(session, ASKED + silence(0.8))
        events = until(session, "response.done")
        assert of(events, "input_audio_buffer.speech_started")
        response = events[-1].response
        assert response.id == of(begun, "response.created")[0].response.id
        assert (response.status, response.status_details.type) == ("cancelled", "cancelled")
        assert response.status_details.reason == "turn_detected"
        assert response.output[0].status == "incomplete"
        for name in ("output_audio", "output_audio_transcript", "content_part", "output_item"):
            assert len(of(events, f"response.{name}.done")) == 1
        events = until(session, "response.done")
        assert events[-1].response.status == "completed" and transcript(events[-1].response)
        sent = of(begun + events, "response.output_audio.delta")
        assert {event.response_id for event in sent} == {response.id, events[-1].response.id}


def test_a_voice_interrupts_nothing_if_so_wanted(client: openai.OpenAI) -> None:
    with client.realtime.connect(model=MODEL) as session:
        session.recv()
        configure(session, {"turn_detection": {"type": "server_vad", "interrupt_response": False}})
        begin_long(session)
        stream(session, ASKED + silence(0.8))
        error = refusal_after_turn(session)
        assert error.code == "conversation_already_has_active_response"
        assert until(session, "response.done")[-1].response.status == "completed"


def refusal_after_turn(session: RealtimeConnection) -> Any:
    while (event := session.recv()).type != "error":
        assert event.type != "response.done", "the answer was not long enough"
    return event.error


def test_the_client_cancels_an_answer(client: openai.OpenAI) -> None:
    with manual(client) as session:
        write(session, LONG)
        session.response.create()
        current = until(session, "response.created")[-1].response.id
        session.response.cancel(response_id="another")
        session.response.create()
        codes = [refusal_after_turn(session).code for _ in range(2)]
        assert codes == [
            "response_cancel_not_active",
            "conversation_already_has_active_response",
        ]
        session.response.cancel(response_id=current)
        response = until(session, "response.done")[-1].response
        assert (response.id, response.status) == (current, "cancelled")
        assert response.status_details.reason == "client_cancelled"
        session.response.cancel()
        assert refusal(session).code == "response_cancel_not_active"
        assert answer(session).status == "completed"


def test_an_answer_may_be_asked_for_while_the_last_one_ends(client: openai.OpenAI) -> None:
    with manual(client) as session:
        begin_long(session)
        session.response.cancel()
        session.response.create(response={"output_modalities": ["text"]})
        first, second = (until(session, "response.done")[-1].response for _ in range(2))
        assert (first.status, second.status) == ("cancelled", "completed")


def test_what_was_not_heard_is_cut_from_the_history(client: openai.OpenAI) -> None:
    with manual(client) as session:
        write(session, f"Please read aloud: {SENTENCES[1]}")
        response = answer(session)
        assert transcript(response) == SENTENCES[1]
        item_id = response.output[0].id
        item, whole = retrieved(session, item_id)
        length = len(whole) // 2 * 1000 // RATE
        assert item.content[0].transcript == SENTENCES[1]
        heard_ms = length // 2
        session.conversation.item.truncate(item_id=item_id, content_index=0, audio_end_ms=heard_ms)
        event = until(session, "conversation.item.truncated")[-1]
        assert (event.item_id, event.content_index, event.audio_end_ms) == (item_id, 0, heard_ms)
        item, sound = retrieved(session, item_id)
        assert sound == whole[: 2 * (heard_ms * RATE // 1000)]
        kept = item.content[0].transcript.split()
        assert kept == SENTENCES[1].split()[: len(kept)] and 2 <= len(kept) <= 4
        session.conversation.item.truncate(item_id=item_id, content_index=0, audio_end_ms=0)
        until(session, "conversation.item.truncated")
        assert retrieved(session, item_id)[1] == b""
        assert answer(session).status == "completed"


def test_an_interrupted_answer_is_truncated_and_the_dialogue_goes_on(
    client: openai.OpenAI,
) -> None:
    with manual(client) as session:
        begun = begin_long(session)
        item_id = of(begun, "response.output_item.added")[0].item.id
        session.conversation.item.truncate(item_id=item_id, content_index=0, audio_end_ms=100)
        assert refusal_after_turn(session).code == "item_in_progress"
        session.response.cancel()
        session.conversation.item.truncate(item_id=item_id, content_index=0, audio_end_ms=100)
        until(session, "conversation.item.truncated")
        item, sound = retrieved(session, item_id)
        assert len(sound) == 2 * RATE // 10
        assert len(item.content[0].transcript) <= 5  # what 0.1 s have time for
        say(session)
        assert answer(session).status == "completed"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"item_id": "nobody"}, "item_id"),
        ({"content_index": 1}, "content_index"),
        ({"audio_end_ms": 60_000}, "audio_end_ms"),
    ],
)
def test_only_heard_speech_can_be_truncated(
    client: openai.OpenAI, change: dict[str, Any], param: str
) -> None:
    with manual(client) as session:
        say(session)
        place = {"item_id": answer(session).output[0].id, "content_index": 0, "audio_end_ms": 1}
        session.conversation.item.truncate(**(place | change))
        assert refusal(session).param == param
