"""The voices of a tiny Kokoro, which hums: listed, chosen by name, for texts and for answers."""

from __future__ import annotations

import base64
import json
from typing import Any, get_args

import httpx
import numpy as np
import openai
import pytest

from kimia_infer.audio.encode import SpeechFormat
from kimia_infer.audio.files import load_audio
from tests.serving.helpers import Server
from tests.serving.openai.waiting import wait_until_idle
from tests.serving.questions import QUESTION

HEART = "kokoro:af_heart"
TEXT = "Hello there, my friend. How are you today?"
ASKED: dict[str, Any] = {
    "model": "kimi-audio",
    "voice": HEART,
    "input": TEXT,
    "response_format": "pcm",
    "extra_body": {"seed": 1},
}
RATE = 24_000


def speak(client: openai.OpenAI, **fields: Any) -> bytes:
    return client.audio.speech.create(**ASKED | fields).content


def test_voices_are_listed_with_their_languages(front: Server) -> None:
    listed = front.request("GET", "/v1/audio/voices")[1]["data"]
    assert [voice["id"] for voice in listed] == [
        *("default", "anna", "nova", "kokoro:af_heart", "kokoro:am_adam", "kokoro:bf_emma"),
    ]
    assert {voice["id"]: voice.get("language") for voice in listed[2:]} == {
        "nova": None,
        "kokoro:af_heart": "en-us",
        "kokoro:am_adam": "en-us",
        "kokoro:bf_emma": "en-gb",
    }


@pytest.mark.parametrize("form", get_args(SpeechFormat))
def test_every_format_has_the_same_sound(client: openai.OpenAI, form: SpeechFormat) -> None:
    content, pcm = speak(client, response_format=form), speak(client)
    if form == "pcm":
        assert content == pcm  # of the same seed
    else:
        seconds = len(load_audio(content)) / 16_000
        assert seconds == pytest.approx(len(pcm) / 2 / RATE, abs=0.1)


def test_speed_and_mixtures(client: openai.OpenAI) -> None:
    slow, fast = (speak(client, speed=speed) for speed in (0.5, 2.0))
    mixed = speak(client, voice={"id": "kokoro:af_heart:0.3+bf_emma"})
    assert len(slow) > len(speak(client)) > len(fast) and mixed != speak(client)


def test_sentences_come_one_by_one_as_events(front: Server) -> None:
    body = ASKED | {"stream_format": "sse", "seed": 1}
    del body["extra_body"]
    answer = httpx.post(f"{front.url}/v1/audio/speech", json=body)
    lines = [line for line in answer.text.splitlines() if line.startswith("data: ")]
    *deltas, done = (json.loads(line.removeprefix("data: ")) for line in lines)
    assert [event["type"] for event in deltas] == ["speech.audio.delta"] * 2
    assert done["type"] == "speech.audio.done"
    assert done["usage"] == {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"voice": "af_heart"}, "voice", "those of Kokoro, such as kokoro:af_heart"),
        ({"voice": "kokoro:af_hart"}, "voice", "voice: unknown voice 'af_hart'; did you mean"),
        ({"voice": "kokoro:af_heart:x"}, "voice", "expected a name or NAME:WEIGHT"),
        ({"speed": 4.5}, "speed", "4"),
        ({"instructions": "Cheerfully."}, "instructions", "a voice of Kokoro takes none"),
        ({"input": "... !?"}, "input", "input: nothing in it can be spoken"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    client: openai.OpenAI, fields: dict[str, Any], param: str, reason: str
) -> None:
    with pytest.raises(openai.APIStatusError, match=reason) as refused:
        speak(client, **fields)
    assert refused.value.param == param


def ask(client: openai.OpenAI, form: str, **fields: Any) -> Any:
    data = base64.b64encode(QUESTION.read_bytes()).decode()
    part = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    asked: Any = {
        "model": "kimi-audio",
        "modalities": ["text", "audio"],
        "audio": {"voice": HEART, "format": form},
        "messages": [{"role": "user", "content": [part]}],
        "seed": 1,
    }
    return client.chat.completions.create(**asked | fields)


def test_an_answer_in_its_voice(client: openai.OpenAI) -> None:
    answer = ask(client, "wav")
    [choice] = answer.choices
    assert choice.message.audio.transcript == "nine"
    wave = load_audio(base64.b64decode(choice.message.audio.data), sample_rate=RATE)
    assert answer.usage.completion_tokens_details.audio_tokens == 0
    assert answer.kimi_audio == {"seed": 1, "notes": []}
    chunks = ask(client, "pcm16", stream=True)
    deltas = [delta for chunk in chunks if (delta := chunk.choices[0].delta.audio)]
    assert "".join(delta.transcript or "" for delta in deltas) == "nine"
    sound = b"".join(base64.b64decode(delta.data or "") for delta in deltas)
    assert np.allclose(np.frombuffer(sound, "<i2") / 2**15, wave, atol=1e-4)
    # The model can be asked about what it said in that voice.
    earlier: Any = {"role": "assistant", "audio": {"id": choice.message.audio.id}}
    follow: Any = {"role": "user", "content": "Please read aloud: nine"}
    again = client.chat.completions.create(model="kimi-audio", messages=[earlier, follow])
    assert again.choices[0].message.content


def test_who_hangs_up_is_not_spoken_to(front: Server, client: openai.OpenAI) -> None:
    with client.audio.speech.with_streaming_response.create(
        **ASKED | {"input": TEXT * 40}
    ) as answer:
        next(answer.iter_bytes())
    wait_until_idle(front)
    assert speak(client)
