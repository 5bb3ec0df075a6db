"""The trained miniature behind Cog's servers: it hears, answers aloud, remembers, writes down."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from kimia_infer.audio.files import wav_bytes
from tests.serving.helpers import Server, data_uri, joined
from tests.serving.openai.sounds import heard, spoken

QUESTIONS = {
    "what is two plus three": "five",
    "which number comes before ten": "nine",
    "what color is the sky": "blue",
}


@pytest.fixture(params=["many_server", "many_streaming_server"], ids=["whole", "streaming"])
def server(request: pytest.FixtureRequest) -> Server:
    return request.getfixturevalue(request.param)


def ask(server: Server, question: str, **inputs: Any) -> tuple[str, bytes]:
    """Text of the answer to a spoken question, and its sound, a wav file or nothing."""
    answer = server.succeed(audio=data_uri(spoken(question)), seed=1, **inputs)["output"]
    text, samples = joined(answer if isinstance(answer, list) else [answer])
    wave = np.frombuffer(samples, "<i2").astype(np.float32) / 32_768
    return text, wav_bytes(wave, 24_000) if samples else b""


def test_questions_are_answered_aloud(server: Server) -> None:
    for question, expected in QUESTIONS.items():
        text, sound = ask(server, question)
        assert (text, heard(sound)) == (expected, expected)


def test_a_dialogue_is_remembered(server: Server) -> None:
    first, sound = ask(server, "what comes after five")
    assert first == "six"
    said = [
        {"role": "user", "message_type": "audio", "content": 0},
        {"role": "assistant", "message_type": "audio-text", "content": [1, first]},
    ]
    sounds = [data_uri(spoken("what comes after five")), data_uri(sound)]
    text, sound = ask(server, "and then", history=json.dumps(said), history_audio=sounds)
    assert (text, heard(sound)) == ("seven", "seven")


def test_recordings_are_written_down(server: Server) -> None:
    for question in QUESTIONS:
        text, sound = ask(server, question, task="transcribe")
        assert (text.strip(), sound) == (question, b"")
