"""Talking to the server through OpenAI's client."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import httpx
import numpy as np
import openai
from openai.resources.realtime.realtime import RealtimeConnection

from kimia_infer.audio.files import load_audio, pcm16, wav_bytes
from tests.serving.helpers import Server
from tests.serving.openai.sounds import heard
from tests.serving.questions import QUESTION

RATE = 24_000
SPARE = ("session.updated", "conversation.item.added", "conversation.item.done")
"""Events that tests of errors do not look at."""

MODEL = "kimi-audio"


def samples(file: bytes) -> bytes:
    """A file with sound as clients send it: int16 at 24 kHz."""
    return pcm16(load_audio(file, sample_rate=RATE)).tobytes()


ASKED = samples(QUESTION.read_bytes())
"""The question to which the miniature says "nine"."""


def silence(seconds: float) -> bytes:
    return bytes(2 * round(seconds * RATE))


def open_sessions(server: Server) -> float:
    """How many sessions the server has at the moment."""
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    name = "kimi_audio_sessions "
    return next(float(line.removeprefix(name)) for line in lines if line.startswith(name))


def encoded(sound: bytes) -> str:
    return base64.b64encode(sound).decode()


def configure(session: RealtimeConnection, input: Any = None, **fields: Any) -> Any:
    """Change the session; ``input`` are fields of ``audio.input``."""
    audio = {} if input is None else {"audio": {"input": input}}
    session.session.update(session={"type": "realtime", **audio, **fields})
    return until(session, "session.updated")[-1].session


@contextlib.contextmanager
def manual(client: openai.OpenAI, input: Any = None, **fields: Any) -> Iterator[RealtimeConnection]:
    """A session in which the client says when a turn ends."""
    with client.realtime.connect(model=MODEL) as session:
        assert session.recv().type == "session.created"
        configure(session, {"turn_detection": None, **(input or {})}, **fields)
        yield session


def write(session: RealtimeConnection, text: str, role: str = "user") -> str:
    """An item of text; its id."""
    content = [{"type": "output_text" if role == "assistant" else "input_text", "text": text}]
    item: Any = {"type": "message", "role": role, "content": content}
    session.conversation.item.create(item=item)
    return until(session, "conversation.item.done")[-1].item.id


def say(session: RealtimeConnection, sound: bytes = ASKED) -> None:
    """A turn of the user."""
    session.input_audio_buffer.append(audio=encoded(sound))
    session.input_audio_buffer.commit()


def answer(session: RealtimeConnection, **response: Any) -> Any:
    """Ask for a response and wait for its end."""
    session.response.create(response=response)
    return until(session, "response.done")[-1].response


def transcript(response: Any) -> str:
    """What a response says."""
    [item] = response.output
    [part] = item.content
    return part.text if part.type == "output_text" else part.transcript


def refusal(session: RealtimeConnection) -> Any:
    """The error that comes next."""
    while (event := session.recv()).type != "error":
        assert event.type in SPARE, event
    return event.error


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
