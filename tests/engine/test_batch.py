"""Generations that advance together: each finds the ids that it finds alone, or was recorded."""

from __future__ import annotations

import functools
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kimia_infer.engine import generation as generation_module
from kimia_infer.engine.decode import Decoder
from kimia_infer.engine.generation import ControlTokens, Generation
from kimia_infer.layers.quantization import quantize_model
from kimia_infer.layers.sampler import SeededRandomness
from kimia_infer.models.kimi_audio.language_model import LanguageModel, language_model_component
from kimia_infer.utils.graphs import graphs_for
from tests.engine.helpers import RUNS, recorded_uniforms, sampling_of
from tests.paths import GOLDEN
from tests.randomness import RecordedRandomness
from tests.traced import TracedGraphs

SAMPLINGS = [
    {},
    {"text_temperature": 0.9, "text_repetition_penalty": 1.3, "text_repetition_window_size": 4},
    {"text_temperature": 1.3, "text_top_k": 0, "text_repetition_penalty": 1.2,
     "text_repetition_window_size": 0, "audio_temperature": 1.1, "audio_top_k": 0},
    {"audio_temperature": 0.8, "audio_top_k": 10, "audio_repetition_penalty": 1.4},
]  # fmt: skip
CAPACITY = 100

Found = tuple[list[int], list[int], int, bool]


def found(generation: Generation) -> Found:
    return generation.text_ids, generation.audio_ids, generation.steps, generation.ended


def alone(generation: Generation) -> Found:
    for _ in generation.run():
        pass
    return found(generation)


def together(
    decoder: Decoder,
    generations: Sequence[Generation],
    arrives: Callable[[], bool] = lambda: True,
    stop: Callable[[Generation], bool] = lambda generation: False,
) -> list[Found]:
    """What the batch brings, slots being filled as they get free; the polls agree with it.

    ``arrives`` says whether the next one comes before the next step, ``stop`` whether one is
    released early.
    """
    waiting, polls = deque(generations), {generation: [] for generation in generations}
    stopped, reading = set(), None
    while waiting or reading or decoder.room.starts:
        if waiting and not reading and arrives() and decoder.room.make(waiting[0]):
            reading = decoder.begin(waiting.popleft())
        if reading is not None and next(reading, "read") == "read":
            reading = None
        for generation, progress in decoder.step():
            polls[generation].append(progress)
            if progress.finished or stop(generation):
                stopped |= set() if progress.finished else {generation}
                decoder.release(generation)
    assert decoder.room.spans.free == decoder.room.spans.places
    for generation in generations:
        seen = polls[generation]
        assert [i for progress in seen for i in progress.text_ids] == generation.text_ids
        assert [i for progress in seen for i in progress.audio_ids] == generation.audio_ids
        if generation not in stopped:
            ends = [progress.finished for progress in seen]
            assert ends == [False] * (len(seen) - 1) + [True]
    return [found(generation) for generation in generations]


@pytest.fixture(scope="module")
def decoders(model: LanguageModel, control, prompts) -> Callable[..., Decoder]:
    """Decoders for each of the recorded heads, which have to be in place."""
    longest = max(run["params"]["max_new_tokens"] for run in RUNS) + 9
    capacity = max(prompt.length for prompt in prompts.values()) + longest
    return functools.cache(
        lambda heads, make_graphs: Decoder(
            model, control, capacity, make_graphs=make_graphs, slots=3
        )
    )


# The other intervals are those of the runs alone, in test_decode.py.
@pytest.mark.parametrize(("make_graphs", "poll_interval"), [(graphs_for, 1), (TracedGraphs, 7)])
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run["name"])
def test_recorded_run(
    run: dict, make_graphs, poll_interval: int, decoders, prompts, with_heads, long: bool
) -> None:
    """A recorded run twice, with a shorter and a longer one beside it and after it."""
    if not long and (RUNS.index(run) % 2 == 0) == (make_graphs is TracedGraphs):
        pytest.skip("a run is launched in one of the two ways here, in both with --long")
    with_heads(run["heads"])
    params, sampling = run["params"], sampling_of(run["params"])
    steps, decoder = params["max_new_tokens"], decoders(run["heads"], make_graphs)
    uniforms = recorded_uniforms(run, sampling)

    def recorded() -> Generation:
        given = prompts[run["prompt"]], params["output_type"], steps, sampling
        return Generation(decoder, *given, RecordedRandomness(uniforms, {}), poll_interval)

    def other(name: str, output: str, steps: int) -> Generation:
        others = sampling_of(SAMPLINGS[steps % 4])
        given = prompts[name], output, steps, others, SeededRandomness(steps)
        return Generation(decoder, *given, poll_interval)

    first, _, _, last = together(
        decoder,
        [
            recorded(), other("text_only", "both", 4), other("two_audio", "text", steps + 9),
            recorded(),
        ],
    )  # fmt: skip
    assert first == last
    assert first[:3] == (run["returned_text"], run["returned_audio"], run["n_forward"])


@pytest.fixture(scope="module")
def models(model: LanguageModel, prompts: dict, control) -> dict[str, tuple]:
    """One for each way in which a model may be held; texts end early by a token they say."""
    quantized = language_model_component(GOLDEN / "llm")
    int8 = quantize_model(quantized.load(torch.device("cpu"), torch.float32), "int8")
    probe = Decoder(model, control, CAPACITY)
    often = alone(Generation(probe, prompts["two_audio"], "text", 40, sampling_of({}),
                             SeededRandomness(0)))[0]  # fmt: skip
    ends = ControlTokens(control.blank, often[20], control.audio_ends)
    return {
        "full": (model, ends, "none"),
        "track": (model.with_cut_heads(), ends, "none"),
        "int8": (int8, ends, "none"),
        "fp8 cache": (model, ends, "fp8"),
    }


requests = st.lists(
    st.tuples(
        st.sampled_from(["text_only", "two_audio"]),
        st.sampled_from(["text", "both"]),
        st.integers(1, 40),
        st.integers(0, 2**32 - 1),
        st.sampled_from(SAMPLINGS),
    ),
    max_size=7,
)


@settings(
    max_examples=settings.default.max_examples // 2,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    requests=requests,
    slots=st.integers(1, 5),
    places=st.integers(CAPACITY, 3 * CAPACITY),
    interval=st.integers(1, 12),
    held=st.sampled_from(["full", "track", "int8", "fp8 cache"]),
    order=st.randoms(use_true_random=False),
)
def test_ids_are_those_found_alone(
    requests, slots, places, interval, held, order: random.Random, models: dict, prompts: dict
) -> None:
    """Whoever arrives and leaves beside them, each with its own sampling."""
    model, ends, cache = models[held]
    single = Decoder(model, ends, CAPACITY, kv_cache=cache)
    decoder = Decoder(model, ends, CAPACITY, kv_cache=cache, slots=slots, places=places)

    def generations(decoder: Decoder) -> Iterator[Generation]:
        for name, output, steps, seed, params in requests:
            given = prompts[name], output, steps, sampling_of(params), SeededRandomness(seed)
            yield Generation(decoder, *given, interval)

    expected = [alone(generation) for generation in generations(single)]
    left = set()

    def leaves(generation: Generation) -> bool:
        if order.random() < 0.02:
            left.add(generation)
        return generation in left

    beside = list(generations(decoder))
    answers = together(decoder, beside, lambda: order.random() < 0.5, leaves)
    for generation, answer, whole in zip(beside, answers, expected, strict=True):
        if generation in left:
            assert answer[0] == whole[0][: len(answer[0])]
            assert answer[1] == whole[1][: len(answer[1])]
        else:
            assert answer == whole


@pytest.mark.parametrize("make_graphs", [graphs_for, TracedGraphs])
def test_texts_that_are_put_aside_go_on_where_they_were(
    make_graphs, model: LanguageModel, control, prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts begin that could not all become as long as they may; who speaks keeps its places."""
    monkeypatch.setattr(generation_module, "AHEAD", 12)
    asked = [("text_only", "both", 40), ("text_only", "text", 60), ("two_audio", "text", 50),
             ("text_only", "text", 55)]  # fmt: skip

    def generations(decoder: Decoder) -> Iterator[Generation]:
        for name, output, steps in asked:
            given = prompts[name], output, steps, sampling_of(SAMPLINGS[1]), SeededRandomness(3)
            yield Generation(decoder, *given, 5)

    expected = [alone(generation) for generation in generations(Decoder(model, control, CAPACITY))]
    decoder = Decoder(model, control, CAPACITY, make_graphs=make_graphs, slots=4, places=190)
    room, beside, together_with = decoder.room, list(generations(decoder)), set()
    aside: set[Generation] = set()

    def watch(_: Generation) -> bool:
        together_with.add(tuple(beside.index(g) for g in room.starts if g in decoder.running))
        aside.update(room.kept)
        # No later text runs while an earlier one waits.
        begun = list(room.starts)
        waiting = min((begun.index(g) for g in room.kept), default=len(begun))
        assert all(g.speaks or begun.index(g) < waiting for g in decoder.running)
        return False

    assert together(decoder, beside, stop=watch) == expected
    assert sum(g.positions for g in beside[:3]) > 190 and (0, 1, 2) in together_with
    assert aside and beside[0] not in aside


long_texts = st.lists(
    st.tuples(
        st.sampled_from(["text", "text", "text", "both"]),
        st.integers(20, 60),
        st.integers(0, 2**32 - 1),
        st.sampled_from(SAMPLINGS),
    ),
    min_size=2,
    max_size=5,
)


@settings(
    max_examples=settings.default.max_examples // 10,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    requests=long_texts,
    places=st.integers(85, 150),
    interval=st.integers(1, 12),
    held=st.sampled_from(["full", "fp8 cache"]),
    order=st.randoms(use_true_random=False),
)
def test_texts_for_which_there_is_little_room(
    requests, places, interval, held, order: random.Random, control, models: dict, prompts: dict,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Their ids are those found alone, however often they are put aside."""
    monkeypatch.setattr(generation_module, "AHEAD", 12)
    model, _, cache = models[held]

    def generations(decoder: Decoder) -> Iterator[Generation]:
        for output, steps, seed, params in requests:
            given = prompts["text_only"], output, steps, sampling_of(params), SeededRandomness(seed)
            yield Generation(decoder, *given, interval)

    single = Decoder(model, control, CAPACITY, kv_cache=cache)
    expected = [alone(generation) for generation in generations(single)]
    decoder = Decoder(model, control, CAPACITY, kv_cache=cache, slots=4, places=places)
    beside = list(generations(decoder))
    assert together(decoder, beside, lambda: order.random() < 0.5) == expected


def test_some_answers_end_and_others_do_not(models: dict, prompts: dict) -> None:
    """What the property above is about does occur."""
    decoder = Decoder(*models["full"][:2], CAPACITY)
    ends = {
        alone(Generation(decoder, prompts["two_audio"], output, 40, sampling_of(params),
                         SeededRandomness(seed)))[3]
        for params in SAMPLINGS for seed in range(4) for output in ("text", "both")
    }  # fmt: skip
    assert ends == {True, False}


@pytest.fixture
def says_zero(model: LanguageModel) -> Iterator[LanguageModel]:
    """The model with two rows of its text head exchanged, so that it says the id 0 often."""
    weight = model.text_head.weight.data
    model.text_head.weight.data = weight.clone()
    yield model
    model.text_head.weight.data = weight


@pytest.mark.parametrize("make_graphs", [graphs_for, TracedGraphs])
def test_a_row_of_id_zero_gets_no_text_embedding(
    make_graphs, says_zero: LanguageModel, control, prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As published; of each row by itself, whatever the others say."""
    decoder = Decoder(says_zero, control, CAPACITY, make_graphs=make_graphs, slots=3)
    sampling = sampling_of({})

    def generations(decoder: Decoder = decoder) -> list[Generation]:
        return [
            Generation(decoder, prompts[name], "text", 30, sampling, SeededRandomness(0))
            for name in ("two_audio", "text_only")
        ]

    common = max(set(ids := alone(generations()[0])[0]), key=ids.count)
    head = says_zero.text_head.weight.data
    head[[0, common]] = head[[common, 0]]
    expected = [alone(generation) for generation in generations()]
    zeros = [[i == 0 for i in ids[:-1]] for ids, *_ in expected]
    assert any(one != other for one, other in zip(*zeros, strict=True))
    assert together(decoder, generations()) == expected

    def embed_all(audio_ids: Tensor, text_ids: Tensor, *rest) -> Tensor:
        return original(audio_ids, text_ids, *rest) + (text_ids == 0).all() * says_zero.embedding(
            text_ids
        )

    original = says_zero.embed
    monkeypatch.setattr(says_zero, "embed", embed_all)
    other = Decoder(says_zero, control, CAPACITY)
    assert [alone(generation) for generation in generations(other)] != expected


def test_nothing_is_recorded_after_the_start(model: LanguageModel, control, prompts) -> None:
    """Whatever is asked for, and however many run."""
    decoder = Decoder(model, control, CAPACITY, make_graphs=TracedGraphs, buckets=(64, 80), slots=4)
    recorded, chance = decoder.graphs.recorded, random.Random(0)
    generations = []
    for seed in range(24):
        name, output = chance.choice(["text_only", "two_audio"]), chance.choice(["text", "both"])
        given = prompts[name], output, chance.randint(1, 40), sampling_of(chance.choice(SAMPLINGS))
        generations.append(Generation(decoder, *given, SeededRandomness(seed), 5))
    together(decoder, generations, lambda: chance.random() < 0.3)
    assert decoder.graphs.recorded == recorded > 0


def test_a_slot_that_is_released_early_disturbs_no_other(
    model: LanguageModel, control, prompts
) -> None:
    decoder = Decoder(model, control, CAPACITY, slots=2)

    def generation(name: str) -> Generation:
        given = prompts[name], "both", 30, sampling_of({}), SeededRandomness(0)
        return Generation(decoder, *given)

    expected = {name: alone(generation(name)) for name in ("two_audio", "text_only")}
    stopped, kept, later = (generation(n) for n in ("two_audio", "text_only", "two_audio"))
    for one in (stopped, kept):
        assert list(decoder.begin(one))
    assert not decoder.room.fits(1)
    list(decoder.step())
    decoder.release(stopped)
    for _ in decoder.begin(later):
        assert [g for g, _ in decoder.step()] == [kept]
    while later.launched != later.max_steps:
        list(decoder.step())
    assert found(kept) == expected["text_only"] and found(later) == expected["two_audio"]


@pytest.mark.parametrize("make_graphs", [graphs_for, TracedGraphs])
def test_logits_that_are_not_finite_end_their_own_answer(
    make_graphs, model: LanguageModel, control, prompts
) -> None:
    """And leave nothing behind in the places that the next one gets."""
    decoder = Decoder(model, control, CAPACITY, make_graphs=make_graphs, slots=2)

    def generation(name: str) -> Generation:
        given = prompts[name], "both", 30, sampling_of({}), SeededRandomness(0)
        return Generation(decoder, *given)

    expected = alone(generation("text_only"))
    kept, broken, later = (generation(n) for n in ("text_only", "two_audio", "text_only"))
    for one in (kept, broken):
        list(decoder.begin(one))
    with torch.inference_mode():
        start = decoder.room.starts[broken]
        decoder.attention.cache.values[:, :, start : start + broken.positions] = torch.nan
    while decoder.running:
        for one, progress in decoder.step():
            if progress.finished:
                decoder.release(one)
    assert broken.broken and len(broken.text_ids) < 30
    assert alone(later) == expected and not later.broken
    assert found(kept) == expected and not kept.broken
