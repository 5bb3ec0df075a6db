"""Dialogues through OpenAI's client, judged by their words."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import openai
import pytest

from tests.serving.helpers import Server
from tests.serving.openai.sounds import spoken
from tests.serving.realtime.talk import (
    ASKED,
    MODEL,
    RATE,
    answer,
    configure,
    encoded,
    manual,
    of,
    samples,
    say,
    silence,
    spoken_words,
    stream,
    transcript,
    until,
    write,
)

READ = "take the red ball to the school"
WRITTEN_DOWN = "conversation.item.input_audio_transcription"


def test_a_turn_of_the_client_is_answered_in_words_and_sound(client: openai.OpenAI) -> None:
    with manual(client) as session:
        said = set()
        for _ in range(3):  # speech is drawn, and may be unclear
            say(session)
            session.response.create()
            events = until(session, "response.done")
            assert transcript(events[-1].response) == "nine"
            deltas = of(events, "response.output_audio_transcript.delta")
            assert "".join(event.delta for event in deltas) == "nine"
            said.add(spoken_words(events))
        assert "nine" in said


ORDER = [
    "input_audio_buffer.speech_started",
    "input_audio_buffer.speech_stopped",
    "input_audio_buffer.committed",
    "conversation.item.added",
    "conversation.item.done",
    "response.created",
    "response.output_item.added",
    "conversation.item.added",
    "response.content_part.added",
    "response.output_audio_transcript.delta",
    "response.output_audio.delta",
    "response.output_audio.done",
    "response.output_audio_transcript.done",
    "response.content_part.done",
    "conversation.item.done",
    "response.output_item.done",
    "response.done",
]
"""Of the events in a turn, as docs/realtime.md lists them; deltas once."""


@pytest.mark.parametrize("milliseconds", [20, 100])
def test_voice_activity_makes_a_turn(client: openai.OpenAI, milliseconds: int) -> None:
    with client.realtime.connect(model=MODEL) as session:
        created = session.recv()
        assert created.session.audio.input.turn_detection.type == "server_vad"
        stream(session, silence(0.5) + ASKED + silence(0.8), milliseconds)
        events = until(session, "response.done")
    types = list(dict.fromkeys(ORDER))
    assert {event.type for event in events} == set(types)
    names = [e.type for e in events if not e.type.endswith(".delta")]
    assert names == [name for name in ORDER if not name.endswith(".delta")]
    assert len({event.event_id for event in events}) == len(events)
    started, stopped, committed, added, *_ = events
    assert 300 <= started.audio_start_ms <= 700
    assert 2_600 <= stopped.audio_end_ms <= 3_200
    assert started.item_id == stopped.item_id == committed.item_id == added.item.id
    assert committed.previous_item_id is None
    response = events[-1].response
    assert transcript(response) == "nine"
    [item] = response.output
    assert of(events, "conversation.item.added")[1].previous_item_id == added.item.id
    for event in events:
        assert getattr(event, "response_id", response.id) == response.id
        if event.type.startswith(("response.output_audio", "response.content_part")):
            assert (event.item_id, event.output_index, event.content_index) == (item.id, 0, 0)
    usage = response.usage
    assert usage.input_tokens == 6 + usage.input_token_details.audio_tokens
    assert usage.output_tokens == 1 + usage.output_token_details.audio_tokens
    sound = b"".join(base64.b64decode(e.delta) for e in of(events, "response.output_audio.delta"))
    assert len(sound) == 2 * 1920 * usage.output_token_details.audio_tokens


def test_voice_activity_alone_does_not_answer_unless_asked_to(client: openai.OpenAI) -> None:
    with client.realtime.connect(model=MODEL) as session:
        detection = {"type": "server_vad", "create_response": False, "silence_duration_ms": 200}
        session.recv()
        assert configure(session, {"turn_detection": detection}).audio.input.turn_detection
        stream(session, ASKED + silence(0.4))
        until(session, "conversation.item.done")
        assert transcript(answer(session, output_modalities=["text"])) == "nine"


def test_turns_by_meaning_are_turns_by_silence(client: openai.OpenAI) -> None:
    with manual(client) as session:
        for eagerness, expected in (({}, 500), ({"eagerness": "low"}, 1000)):
            asked = {"type": "semantic_vad", **eagerness}
            detection = configure(session, {"turn_detection": asked}).audio.input.turn_detection
            assert (detection.type, detection.silence_duration_ms) == ("server_vad", expected)


def test_what_the_user_says_is_written_down(client: openai.OpenAI) -> None:
    transcription = {"model": "gpt-4o-mini-transcribe", "language": "en"}
    with manual(client, {"transcription": transcription}) as session:
        say(session)
        events = until(session, f"{WRITTEN_DOWN}.completed")
        deltas = "".join(event.delta for event in of(events, f"{WRITTEN_DOWN}.delta"))
        assert deltas == events[-1].transcript == "what is four plus five"
        assert events[-1].usage.type == "duration"
        assert abs(events[-1].usage.seconds - len(ASKED) / 2 / RATE) < 0.001
        session.conversation.item.retrieve(item_id=events[-1].item_id)
        [part] = until(session, "conversation.item.retrieved")[-1].item.content
        assert (part.type, part.transcript) == ("input_audio", "what is four plus five")
        assert base64.b64decode(part.audio) == ASKED


def test_silence_is_written_down_as_nothing(client: openai.OpenAI) -> None:
    with manual(client, {"transcription": {}}) as session:
        say(session, silence(0.5))
        assert until(session, f"{WRITTEN_DOWN}.completed")[-1].transcript == ""


def test_text_is_all_there_is_if_asked_for(client: openai.OpenAI) -> None:
    with manual(client, output_modalities=["text"]) as session:
        say(session)
        session.response.create()
        events = until(session, "response.done")
        assert [event.delta for event in of(events, "response.output_text.delta")] == ["nine"]
        assert of(events, "response.output_text.done")[0].text == "nine"
        assert not [event for event in events if "audio" in event.type.partition("response.")[2]]
        assert transcript(events[-1].response) == "nine"


def test_a_dialogue_remembers_what_was_said(client: openai.OpenAI) -> None:
    with manual(client) as session:
        for words, expected in (("what comes after five", "six"), ("and then", "seven")):
            say(session, samples(spoken(words)))
            assert transcript(answer(session)) == expected


def test_instructions_come_before_what_is_said(client: openai.OpenAI) -> None:
    with manual(client, output_modalities=["text"]) as session:
        say(session)
        assert transcript(answer(session)) == "nine"
    repeat = "Please repeat what you hear."
    with manual(client, output_modalities=["text"], instructions=repeat) as session:
        say(session)
        assert transcript(answer(session)) == "what is four plus five"
        assert transcript(answer(session, instructions="")) == "nine"


def test_an_empty_conversation_is_not_answered(client: openai.OpenAI) -> None:
    with manual(client) as session:
        response = answer(session)
        assert (response.status, response.output) == ("failed", [])
        assert response.status_details.error.message.startswith("conversation: nothing to answer")


def test_items_are_written_read_and_deleted(client: openai.OpenAI) -> None:
    with manual(client, output_modalities=["text"]) as session:
        first = write(session, f"Please read aloud: {READ}")
        assert transcript(answer(session)) == READ
        session.conversation.item.delete(item_id=first)
        assert until(session, "conversation.item.deleted")[-1].item_id == first
        session.conversation.item.retrieve(item_id=first)
        assert session.recv().error.code == "item_not_found"
        given: Any = {"type": "message", "role": "user", "id": "mine"}
        given["content"] = [{"type": "input_audio", "audio": encoded(ASKED)}]
        session.conversation.item.create(item=given, previous_item_id="root")
        added = until(session, "conversation.item.done")[-1]
        assert (added.item.id, added.previous_item_id) == ("mine", None)


def test_a_response_can_stand_beside_the_conversation(client: openai.OpenAI) -> None:
    with manual(client, output_modalities=["text"]) as session:
        say(session)
        asked = until(session, "conversation.item.done")[-1].item.id
        text = [{"type": "input_text", "text": f"Please read aloud: {READ}"}]
        aside = {"type": "message", "role": "user", "content": text}
        told = answer(session, conversation="none", input=[aside], metadata={"topic": "aside"})
        assert (transcript(told), told.conversation_id) == (READ, None)
        assert told.metadata == {"topic": "aside"}
        reference = {"type": "item_reference", "id": asked}
        assert transcript(answer(session, conversation="none", input=[reference])) == "nine"
        session.conversation.item.retrieve(item_id=told.output[0].id)
        assert session.recv().error.code == "item_not_found"
        assert transcript(answer(session)) == "nine"


def test_a_limit_of_tokens_ends_a_response(client: openai.OpenAI) -> None:
    with manual(client, output_modalities=["text"], max_output_tokens=3) as session:
        write(session, f"Please read aloud: {READ}")
        response = answer(session)
        assert (response.status, response.status_details.reason) == (
            "incomplete",
            "max_output_tokens",
        )
        assert READ.startswith(transcript(response)) and response.output[0].status == "incomplete"
        assert response.usage.output_tokens == 3
        assert transcript(answer(session, max_output_tokens="inf")).endswith("school")


def test_ten_sessions_talk_at_a_time(front: Server) -> None:
    client = openai.AsyncOpenAI(base_url=f"{front.url}/v1", api_key="unused", max_retries=0)

    async def talk(number: int) -> str:
        async with client.realtime.connect(model=MODEL) as session:
            sound = silence(0.3) + ASKED + silence(0.8)
            for place in range(0, len(sound), 4800):
                await session.input_audio_buffer.append(audio=encoded(sound[place : place + 4800]))
            async for event in session:
                assert event.type != "error", event
                if event.type == "response.done":
                    return transcript(event.response)
        return ""

    async def talk_all() -> list[str]:
        return await asyncio.gather(*(talk(number) for number in range(10)))

    assert asyncio.run(talk_all()) == ["nine"] * 10
