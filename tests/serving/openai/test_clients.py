"""What clients do: many at a time, hang up, try again, know other libraries."""

from __future__ import annotations

import asyncio
import base64
import time
from typing import Any

import httpx
import openai
import pytest

from kimia_infer.serving.openai.errors import ApiError
from kimia_infer.serving.openai.replies import KEPT_SECONDS, MOST_BYTES, Replies, Reply
from tests.serving.conftest import RATE
from tests.serving.helpers import Server
from tests.serving.openai.chats import ASKED, MODEL, SLOW, SPEECH, STREAMED_SPEECH, said
from tests.serving.openai.sounds import heard
from tests.serving.openai.waiting import wait_until_idle

QUESTIONS = {
    "what is two plus three": "five",
    "what comes after six": "seven",
    "what color is the sky": "blue",
    "tell me nine minus four": "five",
    "which number comes before ten": "nine",
}


def complete_answers(front: Server) -> float:
    """How many answers have been given to the end."""
    lines = httpx.get(f"{front.url}/metrics").text.splitlines()
    name = "kimi_audio_total_seconds_count "
    return next(float(line.removeprefix(name)) for line in lines if line.startswith(name))


@pytest.fixture
def patient(front: Server) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{front.url}/v1", api_key="unused", max_retries=0)


def test_ten_at_a_time(patient: openai.AsyncOpenAI) -> None:
    """Each hears the answer to its own question, in text and in speech, streamed or not."""

    async def whole(question: str) -> tuple[str, str]:
        create = patient.chat.completions.create
        answer = await create(model=MODEL, messages=said(question), seed=1, **SPEECH)
        audio = answer.choices[0].message.audio
        assert audio is not None
        return audio.transcript, heard(base64.b64decode(audio.data))

    async def streamed(question: str) -> tuple[str, str]:
        create = patient.chat.completions.create
        stream = await create(model=MODEL, messages=said(question), stream=True)
        texts = [chunk.choices[0].delta.content or "" async for chunk in stream]
        return "".join(texts), "".join(texts)

    async def all_at_once() -> list[tuple[str, str]]:
        asked = [ask(question) for question in QUESTIONS for ask in (whole, streamed)]
        return await asyncio.gather(*asked)

    expected = [word for word in QUESTIONS.values() for _ in range(2)]
    assert asyncio.run(all_at_once()) == [(word, word) for word in expected]


def test_the_accumulator_of_the_asynchronous_client(patient: openai.AsyncOpenAI) -> None:
    options = {key: value for key, value in STREAMED_SPEECH.items() if key != "stream"}

    async def speak() -> Any:
        manager = patient.chat.completions.stream(model=MODEL, messages=ASKED, seed=1, **options)
        async with manager as stream:
            return await stream.get_final_completion()

    audio = asyncio.run(speak()).choices[0].message.audio
    assert audio.transcript == "nine"
    assert len(base64.b64decode(audio.data)) > 20_000


def test_whoever_hangs_up_frees_the_slot(front: Server, client: openai.OpenAI) -> None:
    wait_until_idle(front)
    before = complete_answers(front)
    stream = client.chat.completions.create(model=MODEL, **SLOW, **STREAMED_SPEECH)
    assert next(iter(stream)).choices[0].delta.role == "assistant"
    assert front.request("GET", "/health")[1]["running"] == 1
    stream.close()
    wait_until_idle(front)
    hurried = client.with_options(timeout=0.5)
    with pytest.raises(openai.APITimeoutError):
        hurried.chat.completions.create(model=MODEL, **SLOW, **SPEECH)
    wait_until_idle(front)
    assert complete_answers(front) == before


def test_busy_servers_are_asked_again_when_they_say(
    limited_front: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client waits exactly as long as the answer's headers ask it to."""
    client = openai.OpenAI(base_url=f"{limited_front.url}/v1", api_key="retrying", max_retries=2)
    for _ in range(RATE):
        client.models.list()
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    with pytest.raises(openai.RateLimitError, match=f"{RATE} requests in a minute") as refused:
        client.chat.completions.create(model="hearing", messages=ASKED)
    assert len(waited) == 2
    last = refused.value.response.headers
    assert 0 < int(last["retry-after-ms"]) / 1000 <= waited[1] <= waited[0] <= 60
    assert refused.value.code == "rate_limit_exceeded"


def test_replies_expire_and_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    replies, now = Replies(), time.time()

    def reply(name: str, size: int = 10, seconds: float = KEPT_SECONDS) -> Reply:
        return Reply(name, "nine", bytes(size), int(now + seconds))

    def known(name: str) -> bool:
        try:
            return replies.find(name, "audio.id").id == name
        except ApiError as error:
            assert (error.status_code, error.param) == (404, "audio.id")
            return False

    replies.keep(reply("first", seconds=5))
    replies.keep(reply("second"))
    assert known("first") and known("second")
    monkeypatch.setattr(time, "time", lambda: now + 6)
    assert not known("first") and known("second")
    for name in ("third", "fourth"):
        replies.keep(reply(name, MOST_BYTES // 2))
    assert [known(name) for name in ("second", "third", "fourth")] == [False, False, True]
