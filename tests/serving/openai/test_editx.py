"""Step-Audio-EditX behind the OpenAI server, by its stock client; weights are small and random."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from kimia_infer.api.editx import EditX
from kimia_infer.api.kimia import KimiAudio
from kimia_infer.audio.files import load_audio, wav_bytes
from kimia_infer.models.step_audio_editx import reference
from kimia_infer.serving.openai import voice_store
from kimia_infer.serving.openai.app import create_app
from kimia_infer.serving.openai.service import Service
from kimia_infer.serving.openai.settings import OpenAISettings
from kimia_infer.utils.errors import RequestCancelled
from tests.models.step_audio_editx.recorded import RECORDED
from tests.models.step_audio_editx.stand_in import short_answers
from tests.paths import MINI
from tests.serving.applications import serving
from tests.serving.helpers import data_uri
from tests.serving.questions import QUESTION

MODEL = "step-audio-editx"
VOICE = (RECORDED / "w16k.wav").read_bytes()
WORDS = "I never thought"
KEYS = ("first", "second")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with short_answers(tmp_path_factory.mktemp("editx")) as weights:
        kimi = KimiAudio(str(MINI), load_detokenizer=False, device="cpu", slots=1)
        yield Service(kimi, OpenAISettings(api_keys=KEYS), EditX(weights, "cpu"))


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    with serving(create_app(service)) as url:
        yield url


def client_of(url: str, key: str = KEYS[0]) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return client_of(url)


def upload(client: openai.OpenAI, content: bytes = VOICE, **fields: Any) -> Any:
    return client.audio.voices.create(
        audio_sample=("voice.wav", content), consent="cons_1", name="mine", extra_body=fields
    )


def speak(client: openai.OpenAI, voice: Any, text: str = "ok", **fields: Any) -> bytes:
    asked = {"model": MODEL, "voice": voice, "input": text, "response_format": "wav"}
    return client.audio.speech.create(**asked, extra_body={"seed": 3, **fields}).content


def test_a_text_is_said_in_an_uploaded_voice(
    client: openai.OpenAI, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL
    voice = upload(client, ref_text=WORDS)
    assert (voice.name, voice.type) == ("mine", "audio_sample")
    first = speak(client, {"id": voice.id})
    assert len(load_audio(first)) > 4_000
    monkeypatch.setattr(reference, "flow_rows", lambda tokens: pytest.fail("read again"))
    assert speak(client, voice.id) == first
    inline = speak(client, "alloy", ref_audio=data_uri(VOICE), ref_text=WORDS)
    assert inline == first


def test_speech_is_sent_as_events(client: openai.OpenAI, url: str) -> None:
    asked = {"model": MODEL, "voice": "alloy", "input": "ok", "response_format": "pcm", "seed": 3}
    asked |= {"ref_audio": data_uri(VOICE), "ref_text": WORDS, "stream_format": "sse"}
    headers = {"Authorization": f"Bearer {KEYS[0]}"}
    answer = httpx.post(f"{url}/v1/audio/speech", json=asked, headers=headers, timeout=60)
    lines = [line for line in answer.text.splitlines() if line.startswith("data: ")]
    *deltas, done = [json.loads(line.removeprefix("data: ")) for line in lines]
    pcm = b"".join(base64.b64decode(delta["audio"]) for delta in deltas)
    assert done["type"] == "speech.audio.done" and done["usage"]["output_tokens"] > 0
    assert len(pcm) == 2 * 2880 * done["usage"]["output_tokens"] // 5


def test_kimi_audio_writes_down_what_is_not_given(
    client: openai.OpenAI, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = []
    stream = EditX.stream
    monkeypatch.setattr(
        EditX,
        "stream",
        lambda self, audio, task, *a, **k: tasks.append(task) or stream(self, audio, task, *a, **k),
    )
    voice = upload(client, QUESTION.read_bytes())
    speak(client, voice.id)
    monkeypatch.setattr(service.model, "transcribe", lambda *a, **k: pytest.fail("heard again"))
    speak(client, voice.id, "what is [Laughter] four plus five", task="paralinguistic")
    speak(client, voice.id, "What is four?", task="emotion", option="happy")
    speak(client, voice.id, "anything", task="denoise")
    assert [task.text for task in tasks] == ["what is four plus five"] * 2 + ["What is four?", ""]
    assert [getattr(t, "target", None) or t.new_text for t in tasks[:2]] == [
        *("ok", "what is [Laughter] four plus five")
    ]


def test_voices_belong_to_their_key_and_go(
    client: openai.OpenAI, url: str, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = client_of(url, KEYS[1])
    mine, again, theirs = upload(client), upload(client), upload(other)
    assert mine.id == again.id != theirs.id and VOICE[:8].hex() not in mine.id

    def listed(client: openai.OpenAI) -> list[str]:
        found = client.get("/audio/voices", cast_to=httpx.Response).json()["data"]
        return [voice["id"] for voice in found if voice["id"].startswith("voice_")]

    assert mine.id in listed(client) and theirs.id not in listed(client)
    with pytest.raises(openai.NotFoundError):
        client.audio.voices.delete(theirs.id)
    assert client.audio.voices.delete(mine.id).deleted and mine.id not in listed(client)
    monkeypatch.setattr(voice_store, "KEPT", 2)
    kept = [upload(other, VOICE + bytes(n)).id for n in range(1, 4)]
    assert listed(other) == kept[1:]
    assert KEYS[1] not in repr(service.voices.find(kept[2]))
    monkeypatch.setattr(voice_store, "KEPT_OF_OWNER", 1)
    upload(other, VOICE)
    assert listed(other) == [theirs.id]
    monkeypatch.setattr(voice_store, "KEPT_SECONDS", -1.0)
    assert listed(other) == []


def sound(seconds: float, rate: int = 16_000, level: float = 0.3) -> bytes:
    return wav_bytes(level * np.sin(np.arange(round(seconds * rate)) * 0.1), rate)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"no audio", "audio_sample: not readable as sound"),
        (sound(30.2), "audio_sample: longer than the permitted 30 s"),
        (sound(0.4), "audio_sample: 0.40 s long; send 0.5 to 30 s"),
        (sound(1, level=0), "audio_sample: the recording is silent"),
        (sound(1, 8_000), "audio_sample: recorded at 8000 Hz"),
        (bytes(voice_store.LARGEST + 1), "audio_sample: larger than 10 MiB"),
    ],
)
def test_what_is_no_voice_is_refused_when_it_is_sent(
    client: openai.OpenAI, content: bytes, said: str
) -> None:
    with pytest.raises(openai.APIStatusError) as error:
        upload(client, content)
    assert error.value.param == "audio_sample"
    assert said in error.value.message and len(error.value.message.splitlines()) == 1


ONE = {"ref_audio": data_uri(sound(1)), "ref_text": "a"}


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("voice", {}),
        ("ref_audio", ONE | {"ref_audio": "/etc/hostname"}),
        ("ref_audio", ONE | {"ref_audio": "http://127.0.0.1/a.wav"}),
        ("ref_audio", ONE | {"ref_audio": "data:audio/wav;base64,$"}),
        ("ref_audio", ONE | {"ref_audio": data_uri(b"no audio")}),
        ("ref_text", ONE | {"ref_text": "a" * 90}),
        ("input", ONE | {"input": "a" * 999}),
        ("input", ONE | {"input": " "}),
        ("task", ONE | {"task": "mood"}),
        ("ref_text", ONE | {"task": "emotion", "option": "happy"}),
        ("input", ONE | {"task": "speed", "option": "faster", "ref_text": "", "input": "a" * 90}),
        ("option", ONE | {"task": "emotion", "option": "hapy"}),
        ("speed", ONE | {"speed": 2}),
        ("instructions", ONE | {"instructions": "Cheerful."}),
        ("ref_audio", {"model": "kimi-audio", "ref_audio": "data:,"}),
    ],
)
def test_what_cannot_be_done_is_refused_by_field(
    client: openai.OpenAI, param: str, fields: dict[str, Any]
) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        speak(client, "alloy", **fields)
    assert error.value.param == param
    assert error.value.message.count("\n") == 0 and f"{param}: " in error.value.message


def test_a_client_that_hangs_up_ends_its_request(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ended = threading.Event(), threading.Event()

    def endless(self: EditX, audio: Any, task: Any, seed: Any, *, check: Any) -> Iterator[Any]:
        begun.set()
        try:
            while True:
                check()
        except RequestCancelled:
            ended.set()
            raise
        yield

    monkeypatch.setattr(EditX, "stream", endless)
    asked = {"model": MODEL, "voice": "alloy", "input": "ok", **ONE}
    headers = {"Authorization": f"Bearer {KEYS[0]}"}
    address = f"{url}/v1/audio/speech"

    async def hang_up() -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            request = asyncio.create_task(client.post(address, json=asked, headers=headers))
            assert await asyncio.to_thread(begun.wait, 30)
            request.cancel()
            await asyncio.wait([request])

    asyncio.run(hang_up())
    assert ended.wait(30)
