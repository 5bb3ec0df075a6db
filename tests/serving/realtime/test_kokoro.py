"""Dialogues in a voice of a tiny Kokoro: turns, speed, interruption, and what is remembered."""

from __future__ import annotations

import openai
import pytest

from tests.serving.realtime.talk import answer, manual, of, refusal, say, transcript, until, write

VOICE = {"output": {"voice": "kokoro:af_heart"}}
LONG = "Please read aloud: turn off the lamp in the kitchen"


def sound_of(events: list) -> int:
    """Characters of the base64 of a response's sound."""
    return sum(len(event.delta) for event in of(events, "response.output_audio.delta"))


def test_an_answer_in_its_voice_and_speed(client: openai.OpenAI) -> None:
    lengths = []
    with manual(client) as session:
        for speed in (0.5, 2.0):
            output = {"voice": "kokoro:af_heart", "speed": speed}
            session.session.update(session={"type": "realtime", "audio": {"output": output}})
            assert until(session, "session.updated")[-1].session.audio.output.speed == speed
            say(session)
            until(session, "conversation.item.done")
            session.response.create()
            events = until(session, "response.done")
            response = events[-1].response
            assert transcript(response) == "nine" and response.status == "completed"
            assert response.usage.output_token_details.audio_tokens == 0
            lengths.append(sound_of(events))
            order = [event.type for event in events]
            spoken = order.index("response.output_audio.delta")
            assert order.index("response.output_audio_transcript.delta") < spoken
    assert lengths[0] > lengths[1] > 0


def test_an_answer_is_cancelled_and_cut(client: openai.OpenAI) -> None:
    with manual(client) as session:
        write(session, LONG)
        session.response.create(response={"audio": VOICE})
        until(session, "response.created")
        session.response.cancel()
        assert until(session, "response.done")[-1].response.status == "cancelled"
        session.response.create(response={"audio": VOICE})
        item = until(session, "response.done")[-1].response.output[0].id
        session.conversation.item.truncate(item_id=item, content_index=0, audio_end_ms=100)
        until(session, "conversation.item.truncated")
        write(session, "Please read aloud: nine")
        assert answer(session, audio=VOICE).status == "completed"


def test_the_speed_ends_with_the_voice(client: openai.OpenAI) -> None:
    with manual(client) as session:
        for output, speed in (
            ({"voice": "kokoro:af_heart", "speed": 2.0}, 2.0),
            ({"voice": "kokoro:bf_emma"}, 2.0),
            ({"voice": "default"}, 1.0),
        ):
            session.session.update(session={"type": "realtime", "audio": {"output": output}})
            assert until(session, "session.updated")[-1].session.audio.output.speed == speed


@pytest.mark.parametrize(
    ("output", "param"),
    [
        ({"voice": "kokoro:nobody"}, "session.audio.output.voice"),
        ({"voice": "default", "speed": 2.0}, "session.audio.output.speed"),
        ({"voice": "kokoro:af_heart", "speed": 9.0}, "session.audio.output.speed"),
    ],
)
def test_what_is_refused(client: openai.OpenAI, output: dict, param: str) -> None:
    with manual(client) as session:
        session.session.update(session={"type": "realtime", "audio": {"output": output}})
        error = refusal(session)
        assert error.param == param and param in error.message
