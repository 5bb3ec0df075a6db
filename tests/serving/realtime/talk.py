"""Talking to the server through OpenAI's client."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from typing import Any

import numpy as np
from openai.resources.realtime.realtime import RealtimeConnection

from kimia_infer.audio.files import load_audio, pcm16, wav_bytes
from tests.serving.openai.sounds import heard
from tests.serving.questions import QUESTION

RATE = 24_000
MODEL = "kimi-audio"


def samples(file: bytes) -> bytes:
    """A file with sound as clients send it: int16 at 24 kHz."""
    return pcm16(load_audio(file, sample_rate=RATE)).tobytes()


ASKED = samples(QUESTION.read_bytes())
"""The question to which the miniature says "nine"."""


def silence(seconds: float) -> bytes:
    return bytes(2 * round(seconds * RATE))


def encoded(sound: bytes) -> str:
    return base64.b64encode(sound).decode()


def configure(session: RealtimeConnection, input: Any = None, **fields: Any) -> Any:
    """Change the session; turns are manual unless ``input`` says otherwise."""
    given = {"turn_detection": None} if input is None else input
    session.session.update(session={"type": "realtime", "audio": {"input": given}, **fields})
    return until(session, "session.updated")[-1]


def say(session: RealtimeConnection, sound: bytes = ASKED, **response: Any) -> None:
    """A turn of the user, and the request to answer it."""
    session.input_audio_buffer.append(audio=encoded(sound))
    session.input_audio_buffer.commit()
    session.response.create(response=response)


def stream(session: RealtimeConnection, sound: bytes, milliseconds: int = 40) -> None:
    """Send ``sound`` in pieces, as a microphone does, but as fast as they are taken."""
    step = 2 * RATE * milliseconds // 1000
    for place in range(0, len(sound), step):
        session.input_audio_buffer.append(audio=encoded(sound[place : place + step]))


def until(session: RealtimeConnection, last: str) -> list[Any]:
    """Events up to the first of type ``last``; an error that was not waited for fails."""
    found = []
    while True:
        event = session.recv()
        found.append(event)
        if event.type == last:
            return found
        assert event.type != "error", event


def of(events: Iterable[Any], type: str) -> list[Any]:
    return [event for event in events if event.type == type]


def spoken_words(events: Iterable[Any]) -> str:
    """What is said in the audio of a response, by an ear that knows nothing of the model."""
    sound = b"".join(base64.b64decode(e.delta) for e in of(events, "response.output_audio.delta"))
    wave = np.frombuffer(sound, "<i2").astype(np.float32) / 32_768
    return heard(wav_bytes(wave, RATE))
