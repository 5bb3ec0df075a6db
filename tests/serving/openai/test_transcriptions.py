"""Recordings to text through OpenAI's own client."""

from __future__ import annotations

import asyncio
import contextlib
import re
import resource
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from kimia_infer.audio.encode import encode
from kimia_infer.audio.files import SAMPLE_RATE, load_audio
from tests.serving.helpers import PATIENCE, Server, silence, stored
from tests.serving.openai.waiting import wait_until_idle
from tests.serving.questions import QUESTION

WORDS = "what is four plus five"
MODEL = "kimi-audio"

Create = Callable[..., Any]


@pytest.fixture(scope="session")
def talk() -> bytes:
    """The question, a second and a half of silence, and the question again, as an mp3."""
    once = load_audio(QUESTION)
    gap = np.zeros(3 * SAMPLE_RATE // 2, np.float32)
    return encode(np.concatenate([once, gap, once]), "mp3", SAMPLE_RATE)


@pytest.fixture
def transcribe(client: openai.OpenAI) -> Create:
    def create(file: Any = QUESTION, **fields: Any) -> Any:
        return client.audio.transcriptions.create(model=MODEL, file=file, **fields)

    return create


def test_text_and_usage(transcribe: Create) -> None:
    answer = transcribe()
    assert answer.text == WORDS
    assert answer.usage.type == "tokens"
    assert answer.usage.output_tokens == 5
    assert answer.usage.total_tokens == answer.usage.input_tokens + 5
    details = answer.usage.input_token_details
    assert details.audio_tokens == 25  # 12.5 a second
    assert details.audio_tokens + details.text_tokens == answer.usage.input_tokens
    assert transcribe(response_format="text") == f"{WORDS}\n"


def test_segments_have_their_times(transcribe: Create, talk: bytes) -> None:
    answer = transcribe(("talk.mp3", talk), response_format="verbose_json")
    seconds = 2 * len(load_audio(QUESTION)) / SAMPLE_RATE + 1.5
    assert answer.text == f"{WORDS} {WORDS}"
    assert (answer.task, answer.language) == ("transcribe", "english")
    assert answer.duration == pytest.approx(seconds, abs=0.15)
    assert answer.usage.seconds == answer.duration
    first, *_, last = answer.segments
    assert [segment.id for segment in answer.segments] == list(range(len(answer.segments)))
    assert " ".join(segment.text for segment in answer.segments) == answer.text
    assert 0 <= first.start < 0.2 and answer.duration - 0.4 < last.end < answer.duration
    assert first.seek == 0 and 0 <= 100 * last.start - last.seek < 150
    assert all(a.end <= b.start for a, b in zip(answer.segments, answer.segments[1:], strict=False))
    assert sum(len(segment.tokens) for segment in answer.segments) == 10
    assert {(s.temperature, s.avg_logprob, s.no_speech_prob) for s in answer.segments} == {
        (0.0, None, None)
    }


def test_subtitles(transcribe: Create, talk: bytes) -> None:
    srt = transcribe(("talk.mp3", talk), response_format="srt")
    vtt = transcribe(("talk.mp3", talk), response_format="vtt")
    numbers, times, lines = zip(*re.findall(r"(\d+)\n(.+ --> .+)\n(.+)\n", srt), strict=True)
    assert numbers == tuple(str(n) for n in range(1, len(lines) + 1))
    assert " ".join(lines) == f"{WORDS} {WORDS}"
    assert times[0].startswith("00:00:00,")
    assert vtt.startswith("WEBVTT\n\n00:00:00.")
    assert [line.replace(".", ",") for line in re.findall(".+ --> .+", vtt)] == list(times)
    assert re.findall("what.*|.*five", vtt) == re.findall("what.*|.*five", srt)


def test_a_stream_gives_text_as_it_comes(transcribe: Create, talk: bytes) -> None:
    events = list(transcribe(("talk.mp3", talk), stream=True))
    *deltas, done = events
    assert {event.type for event in deltas} == {"transcript.text.delta"}
    assert "".join(event.delta for event in deltas) == done.text == f"{WORDS} {WORDS}"
    assert len(deltas) == 10
    assert done.type == "transcript.text.done" and done.usage.output_tokens == 10


def test_a_verbose_stream_has_segments(transcribe: Create, talk: bytes) -> None:
    given = {"file": ("talk.mp3", talk), "response_format": "verbose_json"}
    streamed = [e for e in transcribe(**given, stream=True) if e.type == "transcript.text.segment"]
    whole = transcribe(**given).segments
    assert [(e.start, e.end, e.text) for e in streamed] == [(s.start, s.end, s.text) for s in whole]
    assert len({e.id for e in streamed}) == len(streamed)


def test_fields_that_change_how_it_is_asked(transcribe: Create) -> None:
    assert transcribe(prompt="A child asks for sums.", language="en").text == WORDS
    assert transcribe(chunking_strategy="auto", temperature=0.0).text == WORDS
    verbose = transcribe(
        response_format="verbose_json", timestamp_granularities=["segment"], language="EN-us"
    )
    assert verbose.language == "english"
    chinese = transcribe(response_format="verbose_json", language="zh")
    assert chinese.language == "chinese"  # what was asked for; the miniature has no Chinese


def test_silence_has_no_text_and_says_so(transcribe: Create) -> None:
    answer = transcribe(("silence.wav", silence(3)), response_format="verbose_json")
    assert answer.text == "" and answer.segments == []
    assert "silent" in answer.kimi_audio["notes"][0]
    assert transcribe(("silence.wav", silence(3)), response_format="srt") == ""


def test_translations(client: openai.OpenAI) -> None:
    """English stays English: the miniature has no other language."""
    with pytest.warns(DeprecationWarning):
        answer = client.audio.translations.create(
            model=MODEL, file=QUESTION, response_format="verbose_json"
        )
    assert (answer.task, answer.language, answer.text) == ("translate", "english", WORDS)
    assert answer.segments[0].text == WORDS
    with pytest.warns(DeprecationWarning):
        assert client.audio.translations.create(model=MODEL, file=QUESTION).text == WORDS


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"response_format": "diarized_json"}, "response_format", "speakers apart"),
        ({"response_format": "docx"}, "response_format", "'srt', 'vtt'"),
        (
            {"response_format": "verbose_json", "timestamp_granularities": ["word", "segment"]},
            "timestamp_granularities[]",
            "words have no times",
        ),
        (
            {"timestamp_granularities": ["segment"]},
            "timestamp_granularities[]",
            "only with response_format 'verbose_json'",
        ),
        ({"stream": True, "response_format": "srt"}, "stream", "'verbose_json'"),
        ({"include": ["logprobs"]}, "include[]", "no probabilities"),
        ({"keywords": ["anna"]}, "keywords[]", "in prompt"),
        ({"languages": ["en", "de"]}, "languages[]", "name one in language"),
        ({"known_speaker_names": ["anna"]}, "known_speaker_names[]", "speakers apart"),
        ({"chunking_strategy": {"type": "server_vad"}}, "chunking_strategy[type]", "at pauses"),
        ({"chunking_strategy": "server_vad"}, "chunking_strategy", "at pauses"),
        ({"language": "de"}, "language", r"English \(en\) and Chinese \(zh\), found 'de'"),
        ({"temperature": 1.5}, "temperature", "less than or equal to 1"),
        ({"temperature": float("nan")}, "temperature", "finite"),
        ({"prompt": "a" * 2001}, "prompt", "at most 2000"),
        ({"extra_body": {"hotwords": "anna"}}, "hotwords", "unknown field"),
        ({"extra_body": {"langage": "en"}}, "langage", "did you mean language"),
        ({"model": "gpt-9"}, "model", "no 'gpt-9' here"),
        ({"file": ("empty.wav", b"")}, "file", "empty file"),
        ({"file": ("note.txt", b"what is four plus five")}, "file", "no audio track|not readable"),
        ({"file": ("broken.mp3", bytes(range(256)) * 40)}, "file", "no audio track|not readable"),
        ({"file": ("head.wav", QUESTION.read_bytes()[:44])}, "file", "no sound in it"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    client: openai.OpenAI, fields: dict[str, Any], param: str, reason: str
) -> None:
    with pytest.raises(openai.APIStatusError, match=reason) as refused:
        client.audio.transcriptions.create(**{"model": MODEL, "file": QUESTION, **fields})
    assert refused.value.status_code in (400, 404)
    assert refused.value.param == param
    assert "/" not in refused.value.message.partition("file: ")[2]  # no path of the server


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"data": {"model": MODEL}}, "file"),
        ({"files": {"file": b"sound"}}, "model"),
        ({"data": {"model": MODEL, "file": "/etc/passwd"}}, "file"),
        (
            {"data": {"model": MODEL}, "files": [("file", QUESTION.read_bytes())] * 2},
            "file",
        ),
        ({"json": {"model": MODEL, "file": "/etc/passwd"}}, "file"),
        (
            {
                "content": b"--x\r\nbroken",
                "headers": {"Content-Type": "multipart/form-data; boundary=x"},
            },
            "file",
        ),
    ],
)
def test_other_bodies_are_errors_of_the_caller(
    front: Server, body: dict[str, Any], param: str
) -> None:
    answer = httpx.post(f"{front.url}/v1/audio/transcriptions", **body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_recordings_beyond_the_limits(front: Server, transcribe: Create) -> None:
    with pytest.raises(openai.BadRequestError, match="file: longer than the permitted 150 s"):
        transcribe(("long.wav", silence(151)))
    with pytest.raises(openai.APIStatusError, match="more than 20 MB") as refused:
        transcribe(("large.wav", QUESTION.read_bytes() + bytes(20_000_000)))
    assert refused.value.status_code == 413
    assert stored(front) == []


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits of another process")
def test_a_disk_without_room_is_the_servers_fault(
    front: Server, transcribe: Create, replicas: tuple[str, ...]
) -> None:
    """Files of the server may have 1.5 MB for a moment: a larger one is not even received."""
    if replicas:
        pytest.skip("limits of one process, which is not the replica's")
    _, hard = resource.prlimit(front.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(front.pid, resource.RLIMIT_FSIZE, (1_500_000, hard))
    try:
        with pytest.raises(openai.InternalServerError, match="cannot store what was sent") as full:
            transcribe(("long.wav", silence(60)))
        assert transcribe().text == WORDS
    finally:
        resource.prlimit(front.pid, resource.RLIMIT_FSIZE, (hard, hard))
    assert full.value.status_code == 503 and full.value.code == "no_room"
    assert stored(front) == []


def test_answers_are_counted(front: Server, transcribe: Create) -> None:
    def counted(name: str) -> float:
        lines = httpx.get(f"{front.url}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    requests = 'kimi_audio_requests_total{endpoint="/v1/audio/transcriptions",status="200"}'
    names = (requests, "kimi_audio_steps_total", "kimi_audio_total_seconds_count")
    before = [counted(name) for name in names]
    assert transcribe().text == WORDS
    after = [counted(name) for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 6, 1]


def test_many_at_a_time(front: Server, talk: bytes) -> None:
    async def ask(client: openai.AsyncOpenAI, number: int) -> str:
        if number % 2:
            stream = await client.audio.transcriptions.create(
                model=MODEL, file=("talk.mp3", talk), stream=True
            )
            return "".join([e.delta async for e in stream if e.type == "transcript.text.delta"])
        answer = await client.audio.transcriptions.create(model=MODEL, file=("talk.mp3", talk))
        return answer.text

    async def ask_all() -> list[str]:
        url = f"{front.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="unused", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(10)))

    assert set(asyncio.run(ask_all())) == {f"{WORDS} {WORDS}"}
    assert stored(front) == []


@pytest.mark.parametrize("stream", ["true", "false"])
def test_who_hangs_up_leaves_nothing_behind(front: Server, stream: str) -> None:
    once = load_audio(QUESTION)
    long = encode(np.tile(once, 60), "flac", SAMPLE_RATE)
    with contextlib.suppress(httpx.TimeoutException):
        httpx.post(
            f"{front.url}/v1/audio/transcriptions",
            data={"model": MODEL, "stream": stream},
            files={"file": ("long.flac", long)},
            timeout=httpx.Timeout(PATIENCE, read=0.5 if stream == "false" else 0.01),
        )
    wait_until_idle(front)


def test_an_upload_that_ends_early_leaves_nothing_behind(front: Server) -> None:
    host, port = front.url.removeprefix("http://").split(":")
    head = (
        f"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: {host}\r\nContent-Length: 3000000\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
        '--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
    )
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + bytes(2_000_000))
    wait_until_idle(front)
    assert front.request("GET", "/health")[0] == 200


def test_names_of_uploads_are_no_paths(front: Server, transcribe: Create) -> None:
    sound = Path(QUESTION).read_bytes()
    for name in ("../../../tmp/stolen.wav", "/etc/passwd", "a" * 500 + ".wav", "x\n.wav"):
        assert transcribe((name, sound)).text == WORDS
    assert stored(front) == []
