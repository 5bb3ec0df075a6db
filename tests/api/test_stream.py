"""Answers as they come: the pieces joined are the answer, and stopping stops."""

from __future__ import annotations

import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kimia_infer.api.events import AudioChunk, Completion, TextDelta
from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.parameters import parse_parameters
from kimia_infer.api.request import Deadline
from kimia_infer.engine import speech as speech_module
from kimia_infer.engine.scheduler import FIRST_SPEECH_INTERVAL, Scheduler
from kimia_infer.engine.speech import Speech, Synthesizer
from kimia_infer.layers.sampler import SeededRandomness
from kimia_infer.models.kimi_audio.detokenizer import PRESETS
from kimia_infer.models.kimi_audio.text_tokenizer import TextStream
from kimia_infer.utils.errors import RequestCancelled, RequestError
from tests.clock import set_clock

CHAT = [{"role": "user", "message_type": "text", "content": "tell me about the weather"}]
SAMPLED = {"audio_temperature": 1.0, "audio_top_k": 50, "text_temperature": 1.0, "seed": 4}


@pytest.fixture(scope="module")
def model(golden: Path) -> KimiAudio:
    return KimiAudio(str(golden / "e2e" / "checkpoint"), device="cpu", dtype="float32")


@pytest.mark.parametrize("preset", PRESETS)
def test_joined_pieces_are_the_answer(model: KimiAudio, preset: str) -> None:
    arguments = SAMPLED | {"output_type": "both", "max_new_tokens": 100, "preset": preset}
    *pieces, completion = model.stream(CHAT, **arguments)
    assert isinstance(completion, Completion)
    text = "".join(piece.text for piece in pieces if isinstance(piece, TextDelta))
    waves = [piece.wav for piece in pieces if isinstance(piece, AudioChunk)]
    assert all(len(wav) for wav in waves)
    assert len(waves) > 1
    wav, expected = model.generate(CHAT, **arguments)
    assert text == expected == completion.text
    assert torch.equal(torch.cat(waves)[None], wav)
    assert wav.shape == (1, 1920 * len(completion.codes))
    assert isinstance(pieces[0], TextDelta)
    first = next(i for i, piece in enumerate(pieces) if isinstance(piece, AudioChunk))
    assert any(isinstance(piece, TextDelta) for piece in pieces[first:])


def test_a_request_is_cancelled_from_another_thread(model: KimiAudio) -> None:
    """Within a step; whoever waits for the answer hears of it."""
    launched, gate, deadline = [], threading.Semaphore(3), Deadline(None)
    launch = model.decoder._launch

    def step() -> None:
        assert gate.acquire(timeout=60)
        launched.append(1)
        launch()

    options = parse_parameters(**SAMPLED, output_type="both", max_new_tokens=100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.decoder, "_launch", step)
        steps = model.respond(CHAT, options, deadline=deadline)
        next(steps)
        thread = threading.Thread(target=deadline.cancel)
        thread.start()
        thread.join()
        gate.release(100)
        with pytest.raises(RequestCancelled):
            list(steps)
    assert len(launched) <= 3 + 1
    with pytest.raises(RequestCancelled):
        list(model.respond(CHAT, options, deadline=deadline))


def test_low_latency_sounds_earlier(model: KimiAudio) -> None:
    def steps_to_first_sound(preset: str) -> int:
        options = parse_parameters(**SAMPLED, output_type="both", max_new_tokens=80, preset=preset)
        done = []
        events = model.respond(CHAT, options, on_step=lambda steps, _: done.append(steps))
        next(event for event in events if isinstance(event, AudioChunk))
        events.close()
        return done[-1]

    delay = model.language_model.config.audio_delay
    codes = {"quality": 30, "low_latency": 16}
    for preset, needed in codes.items():
        # A chunk goes out with the code after it.
        assert steps_to_first_sound(preset) >= delay + needed + 1
    assert steps_to_first_sound("low_latency") < steps_to_first_sound("quality")


@pytest.mark.parametrize("preset", PRESETS)
def test_rare_polls_change_nothing_and_chunks_go_out_on_time(
    model: KimiAudio, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    """However rarely the host polls, it polls where a chunk can be complete."""
    options = parse_parameters(**SAMPLED, output_type="both", max_new_tokens=100, preset=preset)

    def run() -> tuple[Completion, list[int]]:
        polls: list[int] = []
        released = []
        for event in model.respond(CHAT, options, on_step=lambda steps, _: polls.append(steps)):
            if isinstance(event, AudioChunk):
                released.append(polls[-1])
        return event, released

    expected, on_time = run()
    for interval in (7, 1000):
        monkeypatch.setattr(model.scheduler, "poll_interval", interval)
        actual, released = run()
        assert actual.text == expected.text
        assert torch.equal(actual.wav, expected.wav)
        assert released[:-1] == on_time[:-1]
        assert actual.metrics["decode_steps"] == expected.metrics["decode_steps"]


def test_polls_are_frequent_until_the_first_speech(
    model: KimiAudio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While its chunk is synthesized beside the steps, and only then, polls are frequent."""
    monkeypatch.setattr(model.scheduler, "poll_interval", 1000)
    finished, polls, waiting = Synthesizer.finished, [], []

    def late(synthesizer: Synthesizer):
        if synthesizer._batch is not None and len(waiting) < 5:
            waiting.append(polls[-1])
            return iter(())
        return finished(synthesizer)

    pass_on = Scheduler._pass_on

    def watched(scheduler: Scheduler, task, generation, progress) -> None:
        polls.append(progress.steps)
        pass_on(scheduler, task, generation, progress)

    monkeypatch.setattr(Synthesizer, "finished", late)
    monkeypatch.setattr(Scheduler, "_pass_on", watched)
    options = parse_parameters(**SAMPLED, output_type="both", max_new_tokens=100)
    assert model.complete(CHAT, options).codes
    assert [b - a for a, b in pairwise(waiting)] == [FIRST_SPEECH_INTERVAL] * 4
    after = [step for step in polls if step > waiting[-1]]
    assert len(after) < (polls[-1] - waiting[-1]) / FIRST_SPEECH_INTERVAL / 2


def test_closing_the_stream_frees_the_slot_within_a_step(model: KimiAudio) -> None:
    launched, gate = [], threading.Semaphore(3)
    launch = model.decoder._launch

    def step() -> None:
        assert gate.acquire(timeout=60)
        launched.append(1)
        launch()

    options = parse_parameters(output_type="both", max_new_tokens=90)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.decoder, "_launch", step)
        events = model.respond(CHAT, options)
        next(events)
        events.close()
        gate.release(90)
        while model.scheduler.taken:
            time.sleep(0.001)
    assert len(launched) <= 3 + 1
    assert model.decoder.room.spans.free == model.decoder.room.spans.places
    assert not model.decoder.running
    assert model.complete(CHAT, options).text


def test_an_exception_of_the_consumer_ends_the_request(model: KimiAudio) -> None:
    class Stop(BaseException):
        pass

    def stop(steps: int, limit: int) -> None:
        if steps == 3:
            raise Stop

    options = parse_parameters(output_type="both", max_new_tokens=50)
    with pytest.raises(Stop):
        model.complete(CHAT, options, on_step=stop)
    assert model.generate(CHAT, max_new_tokens=5)[1]


def test_bad_arguments_are_refused_before_anything_runs(model: KimiAudio) -> None:
    with pytest.raises(RequestError, match="preset"):
        model.stream(CHAT, preset="fast")
    with pytest.raises(RequestError, match="did you mean audio_temperature or text_temperature"):
        model.stream(CHAT, temperature=1.0)


@settings(max_examples=8)
@given(st.lists(st.integers(0, 30), max_size=4))
def test_speech_is_of_one_piece(model: KimiAudio, portions: list) -> None:
    """However the codes arrive, published chunking gives the published wave."""
    total = sum(portions)
    codes = torch.randint(
        model.detokenizer.dit.config.codes, (total,), generator=torch.Generator().manual_seed(total)
    )
    noise = model._noise(SeededRandomness(1))
    speech, synthesizer = (
        Speech(model.detokenizer, noise, "quality"),
        Synthesizer(model.detokenizer),
    )
    waves = []

    def compute() -> None:
        assert not synthesizer.start([speech])
        waves.extend(wave for _, wave in synthesizer.finished())

    for portion in codes.split(portions):
        speech.feed(portion.tolist())
        compute()
    speech.finish()
    while speech.busy:
        compute()
    speech.close()
    if not total:
        assert not waves
        return
    assert torch.equal(torch.cat(waves)[None], model.detokenizer.synthesize(codes, noise))


def test_who_runs_dry_first_goes_first(model: KimiAudio, monkeypatch: pytest.MonkeyPatch) -> None:
    """First chunks before later ones whose listeners still have sound."""
    clock = [0.0]
    set_clock(monkeypatch, speech_module, lambda: clock[0])
    synthesizer = Synthesizer(model.detokenizer)
    monkeypatch.setattr(model.detokenizer, "batch_limit", 1)
    noise = model._noise(SeededRandomness(1))

    def speech(heard_seconds: float | None) -> Speech:
        made = Speech(model.detokenizer, noise, "low_latency")
        if heard_seconds is not None:
            made.made(torch.zeros(round(24_000 * heard_seconds)), 0.0)
        return made

    dry, plenty, little = speech(1.0), speech(9.0), speech(4.0)
    clock[0] = 2.0
    first, second = speech(None), speech(None)
    for waiting in (plenty, second, little, first, dry):
        clock[0] = 3.0 if waiting is second else 2.5
        waiting.feed([1] * 17)
    order = []
    while len(order) < 5:
        clock[0] = 3.5
        assert not synthesizer.start([plenty, second, little, first, dry])
        order += [speech for speech, _ in synthesizer.finished()]
    assert order == [dry, first, second, little, plenty]


def test_a_chunk_that_fails_fails_alone(model: KimiAudio, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even when it is computed with others."""
    monkeypatch.setattr(model.detokenizer, "fitting", len)
    noise, synthesizer = model._noise(SeededRandomness(1)), Synthesizer(model.detokenizer)
    good, bad, other = (Speech(model.detokenizer, noise, "quality") for _ in range(3))
    good.feed([1] * 31)
    bad.feed([10**6] * 31)
    other.feed([2] * 31)
    failed = synthesizer.start([good, bad, other])
    assert list(failed) == [bad]
    assert isinstance(failed[bad], ValueError)
    waves = dict(synthesizer.finished())
    for speech, code in ((good, 1), (other, 2)):
        alone = model.detokenizer.start(noise).push([code] * 30, final=False)
        torch.testing.assert_close(waves[speech], alone, atol=1e-5, rtol=0)
    assert set(waves) == {good, other}


@given(st.lists(st.integers(0, 300), max_size=30), st.integers(1, 5))
def test_text_stream_joins_to_decode(model: KimiAudio, ids: list[int], portion: int) -> None:
    stream = TextStream(model.text_tokenizer)
    parts = [stream.push(ids[i : i + portion]) for i in range(0, len(ids), portion)]
    assert "".join(parts) + stream.finish() == model.text_tokenizer.decode(ids)
