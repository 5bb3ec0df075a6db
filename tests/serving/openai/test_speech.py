"""Text to speech through OpenAI's own client; what is said is heard by pocketsphinx."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import httpx
import numpy as np
import openai
import pytest

from kimia_infer.audio.encode import MEDIA_TYPES, SpeechFormat
from kimia_infer.audio.files import SAMPLE_RATE, load_audio, wav_bytes
from kimia_infer.serving.openai.settings import OpenAISettings
from kimia_infer.serving.openai.voices import check_voices
from kimia_infer.utils.errors import ConfigurationError
from tests.serving.helpers import Server
from tests.serving.openai.sounds import heard, heard_in
from tests.serving.openai.waiting import wait_until_idle
from tests.serving.questions import QUESTION

MODEL = "kimi-audio"
SEEDED = {"seed": 2}
"""A field beside OpenAI's, as what is sampled may be said badly."""

SENTENCE = "anna has a blue key"
STORY = f"{SENTENCE}. the number is five two nine!\ntake the red ball to the school"
STORY_WORDS = f"{SENTENCE} the number is five two nine take the red ball to the school"

Speak = Callable[..., bytes]


@pytest.fixture
def speak(client: openai.OpenAI) -> Speak:
    def create(text: str = SENTENCE, **fields: Any) -> bytes:
        asked = {"model": MODEL, "voice": "alloy", "input": text, "extra_body": SEEDED, **fields}
        return client.audio.speech.create(**asked).content

    return create


def sound(content: bytes, form: SpeechFormat) -> np.ndarray:
    """The samples of a file at 16 kHz."""
    if form == "pcm":
        samples = np.frombuffer(content, "<i2").astype(np.float32) / 2**15
        content = wav_bytes(samples, 24_000)
    return load_audio(content)


@pytest.mark.parametrize("form", get_args(SpeechFormat))
def test_every_format_says_the_words(client: openai.OpenAI, form: SpeechFormat) -> None:
    asked = {"model": MODEL, "voice": "alloy", "input": SENTENCE, "response_format": form}
    asked["extra_body"] = SEEDED
    with client.audio.speech.with_streaming_response.create(**asked) as answer:
        assert answer.headers["content-type"] == MEDIA_TYPES[form]
        assert heard_in(sound(answer.read(), form), "anything") == SENTENCE


def test_the_default_is_mp3(speak: Speak) -> None:
    assert speak()[0] == 0xFF  # every frame of MPEG audio begins so


def test_sentences_follow_each_other(speak: Speak, client: openai.OpenAI) -> None:
    """The model itself, which knows one sentence at a time, writes down what it said."""
    story = speak(STORY, response_format="wav")
    answer = client.audio.transcriptions.create(model=MODEL, file=("story.wav", story))
    assert answer.text == STORY_WORDS


def test_sound_arrives_before_the_answer_is_complete(front: Server, client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "voice": "alloy", "input": STORY, "response_format": "pcm"}
    with client.audio.speech.with_streaming_response.create(**asked) as answer:
        pieces = iter(answer.iter_bytes())
        first = next(pieces)
        # More than once: between two sentences nothing runs.
        running = any(front.request("GET", "/health")[1]["running"] for _ in range(20))
        rest = b"".join(pieces)
    assert running and len(first) < len(rest)


def test_events_hold_the_file_and_its_usage(front: Server, speak: Speak) -> None:
    asked = {"model": MODEL, "voice": "default", "input": SENTENCE, "stream_format": "sse"}
    answer = httpx.post(
        f"{front.url}/v1/audio/speech", json=asked | SEEDED | {"response_format": "flac"}
    )
    assert answer.headers["content-type"].startswith("text/event-stream")
    *deltas, done = (
        json.loads(line.removeprefix("data: "))
        for line in answer.text.splitlines()
        if line.startswith("data: ")
    )
    assert {event["type"] for event in deltas} == {"speech.audio.delta"}
    content = b"".join(base64.b64decode(event["audio"], validate=True) for event in deltas)
    assert heard(content, "anything") == SENTENCE
    assert done["type"] == "speech.audio.done"
    usage = done["usage"]
    codes = len(load_audio(content)) / SAMPLE_RATE * 12.5
    assert usage["output_tokens"] == pytest.approx(codes, abs=1)
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert done["kimi_audio"] == {"notes": []}


def test_instructions_and_a_voice_object(speak: Speak) -> None:
    content = speak(instructions="Speak in a cheerful tone.", voice={"id": "default"}, speed=1.0)
    assert heard(content, "anything") == SENTENCE


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"input": ""}, "input", "expected some text"),
        ({"input": "a" * 4097}, "input", "at most 4096"),
        ({"input": "... !?"}, "input", "no words to read aloud"),
        ({"input": 7}, "input", "valid string"),
        ({"speed": 1.5}, "speed", "one speed"),
        ({"speed": 0.1}, "speed", "0.25"),
        ({"voice": "bob"}, "voice", "no voice 'bob' here; this server has default"),
        ({"voice": {"id": "bob"}}, "voice", "no voice 'bob'"),
        ({"voice": 3}, "voice", "valid string"),
        ({"response_format": "ogg"}, "response_format", "'mp3', 'opus'"),
        ({"stream_format": "raw"}, "stream_format", "'audio' or 'sse'"),
        ({"model": "tts-9"}, "model", "no 'tts-9' here"),
        ({"extra_body": {"pitch": 2}}, "pitch", "unknown field"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    speak: Speak, fields: dict[str, Any], param: str, reason: str
) -> None:
    with pytest.raises(openai.APIStatusError, match=reason) as refused:
        speak(**fields)
    assert refused.value.status_code in (400, 404, 422)
    assert refused.value.param == param


def test_many_at_a_time(front: Server) -> None:
    texts = [SENTENCE, "tom is in the garden"] * 5

    async def ask_all() -> list[bytes]:
        url = f"{front.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="unused", max_retries=0) as client:
            asked = (
                client.audio.speech.create(
                    model=MODEL, voice="nova", input=text, response_format="wav", extra_body=SEEDED
                )
                for text in texts
            )
            return [answer.content for answer in await asyncio.gather(*asked)]

    understood = [heard(content, "anything") for content in asyncio.run(ask_all())]
    assert understood == texts


def test_who_hangs_up_frees_the_slots(front: Server) -> None:
    asked = {"model": MODEL, "voice": "alloy", "input": f"{STORY}. " * 20, "response_format": "pcm"}
    with httpx.stream("POST", f"{front.url}/v1/audio/speech", json=asked) as answer:
        next(answer.iter_bytes())
    wait_until_idle(front)


def test_voices_by_name(front: Server, speak: Speak) -> None:
    """Recordings speak by their name, also in place of one of OpenAI's voices."""
    listed = front.request("GET", "/v1/audio/voices")[1]["data"]
    assert [voice["id"] for voice in listed][:3] == ["default", "anna", "nova"]
    for voice in ("anna", {"id": "nova"}):
        assert heard(speak(voice=voice), "anything") == SENTENCE
    short = front.files.parent / "voices" / "short.wav"
    short.write_bytes(QUESTION.read_bytes()[:8_000])
    try:
        with pytest.raises(openai.BadRequestError, match=r"voice: 0.25 s long; send 1 to 30 s"):
            speak(voice="short")
    finally:
        short.unlink()
    for unknown in ("bob", "../voices/anna", "anna.wav"):
        with pytest.raises(openai.BadRequestError, match="this server has default, anna, nova"):
            speak(voice=unknown)


def test_voices_are_checked_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "anna.wav").write_bytes(b"no sound")
    settings = OpenAISettings(voices=str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"^KIMI_AUDIO_VOICES: .*anna.wav: "):
        check_voices(settings)
