"""Requests that are answered together, given up and broken: each answer is that of a request alone.

The engine's thread is replaced by turns that a test takes, so that every order can be repeated.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kimia_infer.api.request import Deadline, Response
from kimia_infer.engine import generation
from kimia_infer.engine import scheduler as scheduling
from kimia_infer.engine.generation import Generation
from kimia_infer.models.kimi_audio.detokenizer import Detokenizer
from kimia_infer.utils.errors import (
    RequestCancelled,
    RequestError,
    RequestOutOfMemory,
    RequestTimeout,
    ServiceBusy,
)
from tests.engine.crowd import (
    CAPACITY,
    Asked,
    Crowd,
    check_same,
    completion,
    error_of,
    loaded,
    requests,
)
from tests.traced import FixedShapes, TracedGraphs, set_slots


@pytest.fixture(scope="module", autouse=True)
def _little_ahead() -> Iterator[None]:
    """Texts get more places while they go on, where there are few."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "AHEAD", 16)
        yield


ENDS = ["read", "read", "read", "close", "cancel", "time"]
CROWDS = ["one", "two", "four, little room", "recorded", "recorded, little room"]


@pytest.mark.parametrize("name", CROWDS)
@settings(max_examples=settings.default.max_examples // 10)
@given(data=st.data())
def test_answers_are_those_found_alone(
    name: str, data: st.DataObject, crowds: dict[str, Crowd], alone
) -> None:
    """Whoever comes and goes beside them."""
    crowd = crowds[name]
    crowd.reset()
    chance = random.Random(data.draw(st.integers(0, 2**32 - 1)))
    waiting = data.draw(st.lists(st.tuples(requests, st.sampled_from(ENDS)), max_size=7))
    live: list[tuple[Asked, str, Response, Deadline]] = []
    answered = []
    while waiting or live:
        if waiting and chance.random() < 0.4:
            asked, end = waiting.pop(0)
            live.append((asked, end, *asked.begin(crowd.model)))
        crowd.turn()
        others = []
        for asked, end, response, deadline in live:
            if end == "read" and response.task.ended:
                answered.append((asked, response))
            elif end != "read" and chance.random() < 0.05:
                check_end(crowd, end, response, deadline)
            else:
                others.append((asked, end, response, deadline))
        live = others
    crowd.check_idle()
    for asked, response in answered:
        check_same(completion(response), alone(asked))


def check_end(crowd: Crowd, end: str, response: Response, deadline: Deadline) -> None:
    """Give a request up: a turn later nothing is left of it."""
    complete = response.task.ended
    if end == "close":
        response.close()
    elif end == "cancel":
        deadline.cancel()
    else:
        deadline.seconds, deadline._end = 1.0, -math.inf
    crowd.turn()
    task, scheduler = response.task, crowd.scheduler
    assert task.ended and task not in scheduler._tasks and task not in scheduler._queue
    assert task.generation not in crowd.decoder.room.starts
    if not complete:
        kind = {"close": RuntimeError, "cancel": RequestCancelled, "time": RequestTimeout}[end]
        assert isinstance(error_of(response), kind)


SPEAKING = [Asked("text_only_both", seed=seed) for seed in range(3)]


def two_running(crowd: Crowd) -> list[Response]:
    """Two requests that have spoken some steps, of those that speak for long."""
    responses = [asked.begin(crowd.model)[0] for asked in SPEAKING[:2]]
    while len(crowd.decoder.running) < 2 or crowd.decoder.running[-1].launched < 4:
        crowd.turn()
    return responses


@pytest.fixture(params=["two", "recorded"])
def crowd(request: pytest.FixtureRequest, crowds: dict[str, Crowd]) -> Iterator[Crowd]:
    crowd = crowds[request.param]
    crowd.reset()
    yield crowd
    crowd.check_idle()


@pytest.mark.parametrize(
    ("fault", "expected"),
    [(RuntimeError, RuntimeError), (torch.OutOfMemoryError, RequestOutOfMemory)],
)
@pytest.mark.parametrize("stage", ["encoder", "prompt", "speech"])
def test_what_fails_for_one_fails_for_it_alone(
    crowd: Crowd, alone, monkeypatch: pytest.MonkeyPatch, stage: str, fault: type, expected: type
) -> None:
    """Even if it is computed together with others, and fails whenever it is there."""
    scheduler, detokenizer = crowd.scheduler, crowd.model.detokenizer
    assert detokenizer is not None
    bad = dataclasses.replace(SPEAKING[2], chat="penalty_both")
    (kept, _), (broken, _) = SPEAKING[0].begin(crowd.model), bad.begin(crowd.model)
    encode, embed, compute = scheduler.encode, crowd.decoder._embed, detokenizer._compute

    def encoding(chats: Sequence[Any]) -> Any:
        if any(chat is broken.task.chat for chat in chats):
            raise fault("planted")
        return encode(chats)

    def embedding(generation: Generation) -> torch.Tensor:
        if generation is broken.task.generation:
            raise fault("planted")
        return embed(generation)

    def computing(jobs: Sequence[Any], chunks: Sequence[Any]) -> Any:
        assert broken.task.speech is not None
        if any(job.stream is broken.task.speech._stream for job in jobs):
            raise fault("planted")
        return compute(jobs, chunks)

    with monkeypatch.context() as patch:
        if stage == "encoder":
            patch.setattr(scheduler, "encode", encoding)
            patch.setattr(scheduler, "_encoded_together", 2)
        elif stage == "prompt":
            patch.setattr(crowd.decoder, "_embed", embedding)
        else:
            patch.setattr(detokenizer, "_compute", computing)
            patch.setattr(detokenizer, "fitting", len)
        crowd.finish()
    assert isinstance(error_of(broken), expected)
    check_same(completion(kept), alone(SPEAKING[0]))
    check_same(crowd.answer(bad), alone(bad))


@pytest.mark.parametrize("place", ["_launch", "_poll"])
def test_a_step_without_memory_ends_the_last_request(
    crowd: Crowd, alone, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """The others lose nothing, whether the step or the copy of its result has no room."""
    responses = two_running(crowd)
    original, failures = getattr(crowd.decoder, place), [torch.OutOfMemoryError("no room")]

    def full() -> None:
        if failures:
            raise failures.pop()
        original()

    monkeypatch.setattr(crowd.decoder, place, full)
    crowd.finish()
    assert isinstance(error_of(responses[1]), RequestOutOfMemory)
    check_same(completion(responses[0]), alone(SPEAKING[0]))


def test_a_copy_without_memory_after_the_last_step(
    crowd: Crowd, alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made again."""
    asked = [dataclasses.replace(SPEAKING[0], steps=n, output_type="text") for n in (40, 60)]
    last, other = (one.begin(crowd.model)[0] for one in asked)
    poll, failures = crowd.decoder._poll, [torch.OutOfMemoryError("no room")]

    def full() -> None:
        first = crowd.decoder.running[0]
        if failures and len(crowd.decoder.running) == 2 and first.launched == 40:
            raise failures.pop()
        poll()

    monkeypatch.setattr(crowd.decoder, "_poll", full)
    crowd.finish()
    assert isinstance(error_of(other), RequestOutOfMemory)
    check_same(completion(last), alone(asked[0]))


def test_a_step_that_fails_ends_all_that_run(
    crowd: Crowd, alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with an error of its own; those that wait are answered."""
    responses = [asked.begin(crowd.model)[0] for asked in SPEAKING * 2]
    while not crowd.decoder.running:
        crowd.turn()
    taken = crowd.scheduler.taken
    with monkeypatch.context() as patch:
        patch.setattr(crowd.decoder, "_launch", lambda: 1 / 0)
        crowd.turn()
    errors = [error_of(response) for response in responses[:taken]]
    assert all(isinstance(error, RuntimeError) and "zero" in str(error) for error in errors)
    assert len({id(error) for error in errors}) == len(errors) == taken
    crowd.finish()
    for asked, response in list(zip(SPEAKING * 2, responses, strict=True))[taken:]:
        check_same(completion(response), alone(asked))


def test_nothing_is_computed_for_whoever_leaves_within_a_turn(
    crowd: Crowd, alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a newcomer is encoded: no chunk of the speech that is ready, and no step."""
    (leaving, deadline), speech = SPEAKING[0].begin(crowd.model), crowd.model.detokenizer
    assert speech is not None and leaving.task.speech is not None
    while not leaving.task.speech.waiting:
        crowd.turn()
    newcomer, _ = SPEAKING[1].begin(crowd.model)
    encode, computed = crowd.scheduler.encode, []

    def encoding(chats: Sequence[Any]) -> Any:
        deadline.cancel()
        return encode(chats)

    with monkeypatch.context() as patch:
        patch.setattr(crowd.scheduler, "encode", encoding)
        patch.setattr(speech, "push_together", computed.append)
        generation = leaving.task.generation
        assert generation is not None
        steps = generation.launched
        crowd.turn()
        assert (leaving.task.ended, generation.launched, computed) == (True, steps, [])
    crowd.finish()
    assert isinstance(error_of(leaving), RequestCancelled)
    check_same(completion(newcomer), alone(SPEAKING[1]))


def test_logits_that_are_not_finite_end_their_own_request(crowd: Crowd, alone) -> None:
    kept, broken = two_running(crowd)
    generation = broken.task.generation
    assert generation is not None
    start = crowd.decoder.room.starts[generation]
    with torch.inference_mode():
        crowd.decoder.attention.cache.values[:, :, start : start + generation.positions] = math.nan
    crowd.finish()
    assert isinstance(error_of(broken), FloatingPointError)
    check_same(completion(kept), alone(SPEAKING[0]))
    check_same(crowd.answer(SPEAKING[1]), alone(SPEAKING[1]))


def test_nothing_is_recorded_after_the_start(long: bool) -> None:
    """Whatever 60 requests ask for, and 200 in a long run."""
    model, chance = loaded(), random.Random(0)
    speech = model.detokenizer
    assert speech is not None
    # What it records is launched as it is, since tapes of it would fill the memory.
    graphs = FixedShapes(model.device)
    model.detokenizer = Detokenizer(speech.dit, speech.vocoder, speech.config, graphs, 2)
    model.detokenizer.warm_up()
    crowd = Crowd(set_slots(model, 2, CAPACITY, make_graphs=TracedGraphs))
    recorded = crowd.decoder.graphs.recorded, graphs.recorded
    assert all(recorded)
    for seed in range(200 if long else 60):
        asked = Asked(
            chance.choice(["text_only_both"] * 4 + ["audio_only_both"]),
            chance.choice(["text", "both"]), chance.choice([1, 5, 9, 16]),
            chance.randrange(4), seed, chance.choice(["quality", "low_latency"]),
        )  # fmt: skip
        asked.begin(model)
        for _ in range(chance.randrange(6)):
            crowd.turn()
    crowd.finish()
    crowd.check_idle()
    assert (crowd.decoder.graphs.recorded, graphs.recorded) == recorded


def test_a_full_queue_refuses(crowds: dict[str, Crowd], monkeypatch: pytest.MonkeyPatch) -> None:
    crowd = crowds["two"]
    crowd.reset()
    monkeypatch.setattr(scheduling, "LONGEST_QUEUE", 3)
    short = dataclasses.replace(SPEAKING[0], steps=3)
    responses = [short.begin(crowd.model)[0] for _ in range(3)]
    with pytest.raises(ServiceBusy, match="busy: 3 requests are waiting") as refusal:
        short.begin(crowd.model)
    assert 0 < refusal.value.retry_ms < 60_000
    crowd.finish()
    answers = [completion(response) for response in responses]
    assert [len(answer.text_ids) for answer in answers] == [3, 3, 3]
    check_same(crowd.answer(short), answers[0])


def test_a_request_beyond_the_cache_is_refused_at_once(crowds: dict[str, Crowd]) -> None:
    crowd = crowds["recorded, little room"]
    with pytest.raises(RequestError, match=r"max_new_tokens: .*up to 190.* cache has 200"):
        Asked("asr_text", "text", 190).begin(crowd.model)
    crowd.check_idle()


def test_a_text_that_may_be_long_leaves_room_for_others(crowds: dict[str, Crowd], alone) -> None:
    crowd = crowds["four, little room"]
    crowd.reset()
    longest = Asked("asr_text", "text", CAPACITY - 40, sampling=0)
    first, others = longest.begin(crowd.model)[0], [*SPEAKING[:2], Asked("asr_text", "text", 30)]
    while not crowd.decoder.running:
        crowd.turn()
    assert not crowd.decoder.room.fits(30)
    responses = [asked.begin(crowd.model)[0] for asked in others]
    while not all(response.task.ended for response in responses):
        crowd.turn()
    assert not first.task.ended
    crowd.finish()
    for asked, response in zip([longest, *others], [first, *responses], strict=True):
        check_same(completion(response), alone(asked))
    crowd.check_idle()


@pytest.mark.parametrize("name", ["copied", "put"])
def test_a_text_that_cannot_be_put_aside_costs_the_last_one(
    crowds: dict[str, Crowd], alone, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Or not be brought back; this makes room for those before it."""
    crowd = crowds["four, little room"]
    crowd.reset()

    def fail(*_: Any) -> None:
        monkeypatch.undo()
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(crowd.decoder.rows, name, fail)
    asked = [Asked("asr_text", "text", steps, sampling=0) for steps in (400, 399)]
    first, last = (one.begin(crowd.model)[0] for one in asked)
    crowd.finish()
    assert isinstance(error_of(last), RequestOutOfMemory)
    check_same(completion(first), alone(asked[0]))
    crowd.check_idle()


def test_long_requests_are_not_passed_by_short_ones(crowds: dict[str, Crowd]) -> None:
    """Whoever came first and waits for room is read first."""
    crowd = crowds["four, little room"]
    crowd.reset()
    sizes = [400, 400, 3]
    responses = [Asked("text_only_both", "text", steps).begin(crowd.model)[0] for steps in sizes]
    read = []
    while crowd.scheduler.taken or crowd.scheduler.queued:
        crowd.turn()
        read += [
            n
            for n, response in enumerate(responses)
            if response.task.generation in crowd.decoder.running and n not in read
        ]
    assert read == [0, 1, 2]
