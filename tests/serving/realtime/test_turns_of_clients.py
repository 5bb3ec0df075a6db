"""Turns, as OpenAI's client takes them."""

from __future__ import annotations

import openai

from tests.serving.realtime.talk import (
    ASKED,
    MODEL,
    configure,
    of,
    say,
    silence,
    spoken_words,
    stream,
    until,
)


def test_a_turn_of_the_client_is_answered_in_words_and_sound(client: openai.OpenAI) -> None:
    with client.realtime.connect(model=MODEL) as session:
        assert session.recv().type == "session.created"
        configure(session, {"turn_detection": None, "transcription": {}})
        say(session)
        events = until(session, "response.done")
        response = events[-1].response
        assert response.status == "completed"
        assert [part.transcript for part in response.output[0].content] == ["nine"]
        assert spoken_words(events) == "nine"
        name = "conversation.item.input_audio_transcription.completed"
        heard = of(events, name) or until(session, name)
        assert heard[-1].transcript == "what is four plus five"


def test_voice_activity_makes_turns_of_a_stream(client: openai.OpenAI) -> None:
    with client.realtime.connect(model=MODEL) as session:
        assert session.recv().session.audio.input.turn_detection.type == "server_vad"
        stream(session, silence(0.5) + ASKED + silence(1))
        events = until(session, "response.done")
        assert events[-1].response.output[0].content[0].transcript == "nine"
        assert spoken_words(events) == "nine"
