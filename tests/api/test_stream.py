"""Answers as they come: the pieces joined are the answer, and stopping stops."""

from __future__ import annotations

import threading
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kimia_infer.api.events import AudioChunk, Completion, TextDelta
from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.parameters import parse_parameters
from kimia_infer.api.response import FIRST_SPEECH_INTERVAL, Deadline, SpeechPipeline
from kimia_infer.layers.sampler import SeededRandomness
from kimia_infer.models.kimi_audio.detokenizer import PRESETS
from kimia_infer.models.kimi_audio.text_tokenizer import TextStream
from kimia_infer.utils.errors import RequestCancelled, RequestError
from kimia_infer.utils.graphs import side_thread

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
    done, deadline = [], Deadline(None)
    options = parse_parameters(**SAMPLED, output_type="both", max_new_tokens=100)
    steps = model.respond(CHAT, options, on_step=lambda n, _: done.append(n), deadline=deadline)
    next(steps)
    thread = threading.Thread(target=deadline.cancel)
    thread.start()
    thread.join()
    with pytest.raises(RequestCancelled):
        list(steps)
    assert done[-1] < 10  # of 100
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
@pytest.mark.parametrize("interval", [7, 1000])
def test_rare_polls_change_nothing_and_chunks_go_out_on_time(
    model: KimiAudio, monkeypatch: pytest.MonkeyPatch, preset: str, interval: int
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
    monkeypatch.setattr(model, "poll_interval", interval)
    actual, released = run()
    assert actual.text == expected.text
    assert torch.equal(actual.wav, expected.wav)
    assert released[:-1] == on_time[:-1]
    assert actual.metrics["decode_steps"] == expected.metrics["decode_steps"]


def test_polls_are_frequent_until_the_first_speech(
    model: KimiAudio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While its chunk is synthesized in the background, and only then, polls are frequent."""
    monkeypatch.setattr(model, "poll_interval", 1000)
    ready, polls, waiting = SpeechPipeline.ready, [], []

    def late(pipeline: SpeechPipeline):
        if pipeline.busy and len(waiting) < 5:
            waiting.append(polls[-1])
            return iter(())
        return ready(pipeline)

    monkeypatch.setattr(SpeechPipeline, "ready", late)
    options = parse_parameters(**SAMPLED, output_type="both", max_new_tokens=100)
    for _ in model.respond(CHAT, options, on_step=lambda steps, _: polls.append(steps)):
        pass
    assert [b - a for a, b in pairwise(waiting)] == [FIRST_SPEECH_INTERVAL] * 4
    after = [step for step in polls if step > waiting[-1]]
    assert len(after) < (polls[-1] - waiting[-1]) / FIRST_SPEECH_INTERVAL / 2


def test_closing_the_stream_launches_no_further_step(model: KimiAudio) -> None:
    options = parse_parameters(output_type="both", max_new_tokens=90)
    done = []
    events = model.respond(CHAT, options, on_step=lambda steps, _: done.append(steps))
    next(events)
    events.close()
    assert len(done) < 20
    seen = list(done)
    assert model.complete(CHAT, options).text
    assert done == seen


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


@pytest.mark.parametrize("background", [False, True])
@settings(max_examples=8)
@given(st.lists(st.integers(0, 30), max_size=4))
def test_pipeline_speaks_as_one_piece(model: KimiAudio, background: bool, portions: list) -> None:
    """However the codes arrive, published chunking gives the published wave."""
    total = sum(portions)
    codes = torch.randint(
        model.detokenizer.dit.config.codes, (total,), generator=torch.Generator().manual_seed(total)
    )
    noise = model._noise(SeededRandomness(1))
    pipeline = SpeechPipeline(model.detokenizer, noise, "quality", background)
    waves = []
    for portion in codes.split(portions):
        pipeline.feed(portion.tolist())
        waves += pipeline.ready()
    pipeline.finish()
    waves += pipeline.rest()
    pipeline.close()
    if not total:
        assert not waves
        return
    assert torch.equal(torch.cat(waves)[None], model.detokenizer.synthesize(codes, noise))


def test_answers_start_no_thread(model: KimiAudio) -> None:
    """A cancellation may hit the wrong one of two threads while one starts the other."""
    noise = model._noise(SeededRandomness(1))

    def speak() -> set[threading.Thread]:
        pipeline = SpeechPipeline(model.detokenizer, noise, "quality", background=True)
        pipeline.feed([1] * 31)
        threads = set(threading.enumerate())
        assert len(list(pipeline.rest())) == 1
        pipeline.close()
        return threads

    assert speak() == speak()


def test_closing_drops_what_waits(model: KimiAudio) -> None:
    noise = model._noise(SeededRandomness(1))
    gate = threading.Event()
    blocked = side_thread().submit(gate.wait, 60)
    pipeline = SpeechPipeline(model.detokenizer, noise, "quality", background=True)
    pipeline.feed([1] * 400)
    threading.Timer(0.1, gate.set).start()
    pipeline.close()
    assert blocked.result() and pipeline.seconds == 0.0


def test_a_failure_in_the_background_is_raised(model: KimiAudio) -> None:
    noise = model._noise(SeededRandomness(1))
    pipeline = SpeechPipeline(model.detokenizer, noise, "quality", background=True)
    pipeline.feed([10**6] * 31)
    with pytest.raises(ValueError, match="speech code"):
        list(pipeline.rest())
    pipeline.close()


@given(st.lists(st.integers(0, 300), max_size=30), st.integers(1, 5))
def test_text_stream_joins_to_decode(model: KimiAudio, ids: list[int], portion: int) -> None:
    stream = TextStream(model.text_tokenizer)
    parts = [stream.push(ids[i : i + portion]) for i in range(0, len(ids), portion)]
    assert "".join(parts) + stream.finish() == model.text_tokenizer.decode(ids)
