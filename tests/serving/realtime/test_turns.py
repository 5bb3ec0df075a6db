"""Turns out of a stream of sound, with an ear that hears loudness."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from kimia_infer.serving.openai.errors import ApiError
from kimia_infer.serving.realtime.config import ServerVad
from kimia_infer.serving.realtime.schema import SAMPLE_RATE
from kimia_infer.serving.realtime.turns import (
    MAX_TURN_SECONDS,
    SpeechStarted,
    SpeechStopped,
    Turns,
)
from kimia_infer.serving.realtime.voice_activity import Change, Stream, VoiceActivity
from tests.serving.realtime.talk import ASKED, silence

VAD = ServerVad()


class Loudness:
    """Speech is what is not silent."""

    def reset_states(self) -> None:
        pass

    def __call__(self, window: torch.Tensor, rate: int) -> torch.Tensor:
        return window.abs().max() * 2


class Ear(VoiceActivity):
    """Listens at once."""

    def __init__(self) -> None:
        pass

    async def listen(self, stream: Stream, sound: bytes, settings: ServerVad) -> list[Change]:
        return list(stream.changes(np.frombuffer(sound, "<i2"), settings))


def tone(seconds: float) -> bytes:
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return (np.sin(2 * np.pi * 440 * time) * 16_000).astype("<i2").tobytes()


@pytest.fixture
def turns() -> Turns:
    return Turns(Ear(), Stream(Loudness()))


def append(
    turns: Turns, sound: bytes, vad: ServerVad | None = VAD
) -> list[SpeechStarted | SpeechStopped]:
    async def run() -> list[SpeechStarted | SpeechStopped]:
        return [change async for change in turns.append(sound, vad)]

    return asyncio.run(run())


def test_a_turn_has_padding_before_and_silence_after_it(turns: Turns) -> None:
    started, stopped = append(turns, silence(1) + tone(1) + silence(1))
    assert isinstance(started, SpeechStarted) and isinstance(stopped, SpeechStopped)
    assert started.begin == pytest.approx(0.7 * SAMPLE_RATE, abs=0.04 * SAMPLE_RATE)
    assert stopped.end == pytest.approx(2.5 * SAMPLE_RATE, abs=0.07 * SAMPLE_RATE)
    assert len(stopped.sound) == 2 * (stopped.end - started.begin)
    assert tone(1)[4800:24_000] in stopped.sound


@pytest.mark.parametrize("step", [1, 479, 2400, 100_000])
def test_pieces_do_not_matter(step: int) -> None:
    sound = silence(0.4) + tone(0.3) + silence(0.7) + tone(0.2) + silence(0.7)
    found = []
    turns = Turns(Ear(), Stream(Loudness()))
    if step == 1:
        sound = sound[: 2 * 20_000]
    for place in range(0, len(sound), 2 * step):
        found += append(turns, sound[place : place + 2 * step])
    assert found == append(Turns(Ear(), Stream(Loudness())), sound)


def test_short_pauses_do_not_end_a_turn(turns: Turns) -> None:
    assert len(append(turns, tone(0.5) + silence(0.4) + tone(0.5) + silence(0.7))) == 2
    impatient = VAD.model_copy(update={"silence_duration_ms": 200})
    assert len(append(turns, tone(0.5) + silence(0.4) + tone(0.5) + silence(0.7), impatient)) == 4


def test_a_turn_without_an_end_is_ended(turns: Turns) -> None:
    long = tone(1) * (MAX_TURN_SECONDS + 5)
    started, stopped, again = append(turns, long)
    assert isinstance(stopped, SpeechStopped) and isinstance(again, SpeechStarted)
    assert stopped.end - started.begin == MAX_TURN_SECONDS * SAMPLE_RATE
    assert again.begin >= stopped.end


def test_endless_silence_is_not_kept(turns: Turns) -> None:
    for _ in range(3):
        assert append(turns, silence(MAX_TURN_SECONDS)) == []
        assert len(turns.buffer) == MAX_TURN_SECONDS * SAMPLE_RATE
    [started] = append(turns, tone(1))
    assert started.begin == pytest.approx(179.7 * SAMPLE_RATE, abs=0.04 * SAMPLE_RATE)


def test_without_voice_activity_the_client_commits(turns: Turns) -> None:
    assert append(turns, tone(1), None) == []
    assert turns.commit() == tone(1)
    with pytest.raises(ApiError, match=r"holds 0\.00 ms of sound, and a turn has at least 100 ms"):
        turns.commit()
    append(turns, tone(MAX_TURN_SECONDS), None)
    with pytest.raises(ApiError, match="more than 60 s"):
        append(turns, tone(0.1), None)
    turns.clear()
    assert append(turns, tone(0.1), None) == []


def test_commits_and_clears_end_what_was_heard(turns: Turns) -> None:
    [started] = append(turns, silence(0.5) + tone(0.5))
    assert turns.speaking and len(turns.commit()) == 2 * SAMPLE_RATE
    assert not turns.speaking
    [again] = append(turns, tone(0.5))
    assert again.begin >= SAMPLE_RATE > started.begin
    turns.clear()
    assert not turns.speaking and append(turns, silence(1)) == []


def test_silence_as_a_turn_has_at_least_100_ms(turns: Turns) -> None:
    append(turns, silence(2))
    assert turns.silence(SAMPLE_RATE) == silence(1)
    assert turns.silence(turns.buffer.end) == silence(0.1)


def test_the_detector_leaves_the_threads_of_others_alone() -> None:
    def threads_of(pool: ThreadPoolExecutor) -> int:
        return pool.submit(torch.get_num_threads).result()

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in range(2):  # only the first imports silero-vad
            activity = VoiceActivity()
            with ThreadPoolExecutor(1) as other:
                assert threads_of(other) == torch.get_num_threads() == 2
            assert threads_of(activity.pool) == 1
            activity.close()
    finally:
        torch.set_num_threads(before)


def test_silero_hears_the_question_and_nothing_in_noise() -> None:
    activity = VoiceActivity()

    async def listen(sound: bytes) -> list[Change]:
        stream = await activity.stream()
        return await activity.listen(stream, sound, VAD)

    question = silence(0.5) + ASKED + silence(1)
    noise = np.random.default_rng(0).normal(0, 300, 2 * SAMPLE_RATE).astype("<i2").tobytes()
    for _ in range(2):  # streams share nothing
        started, stopped = asyncio.run(listen(question))
        assert (started.speaking, stopped.speaking) == (True, False)
        assert 0.6 < started.sample / SAMPLE_RATE < 0.9
        assert 2.6 < stopped.sample / SAMPLE_RATE < 3.1
        assert asyncio.run(listen(noise)) == []
    activity.close()
