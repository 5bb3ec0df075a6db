"""Generations that advance together: each finds the ids that it finds alone, or was recorded."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kimia_infer.engine.batch import TextBatch
from kimia_infer.engine.decode import ControlTokens, Decoder, Generation
from kimia_infer.layers.quantization import quantize_model
from kimia_infer.layers.sampler import SeededRandomness
from kimia_infer.models.kimi_audio.language_model import LanguageModel, language_model_component
from kimia_infer.utils.graphs import graphs_for
from tests.engine.helpers import (
    RUNS,
    recorded_uniforms,
    sampling_of,
)
from tests.paths import GOLDEN
from tests.randomness import RecordedRandomness
from tests.traced import TracedGraphs

TEXT_RUNS = [run for run in RUNS if run["params"]["output_type"] == "text"]
SAMPLINGS = [
    {},
    {"text_temperature": 0.9, "text_repetition_penalty": 1.3, "text_repetition_window_size": 4},
    {"text_temperature": 1.3, "text_top_k": 0, "text_repetition_penalty": 1.2,
     "text_repetition_window_size": 0},
]  # fmt: skip
CAPACITY = 100

Found = tuple[list[int], int, bool]


def found(generation: Generation) -> Found:
    return generation.text_ids, generation.steps, generation.ended


def alone(generation: Generation) -> Found:
    for _ in generation.run():
        pass
    return found(generation)


def together(batch: TextBatch, generations: Sequence[Generation]) -> list[Found]:
    """What the batch brings, slots being filled as they get free; the looks agree with it."""
    waiting, looks = deque(generations), {id(generation): [] for generation in generations}
    while waiting or batch.running:
        while waiting and not batch.full:
            batch.begin(waiting.popleft())
        for slot, progress in batch.advance():
            generation = batch.generations[slot]
            looks[id(generation)].append(progress)
            assert progress.steps == generation.launched
            if progress.finished:
                batch.release(slot)
    for generation in generations:
        seen = looks[id(generation)]
        assert [i for look in seen for i in look.text_ids] == generation.text_ids
        assert [look.finished for look in seen] == [False] * (len(seen) - 1) + [True]
    return [found(generation) for generation in generations]


@pytest.mark.parametrize("poll_interval", [1, 7])
@pytest.mark.parametrize("make_graphs", [graphs_for, TracedGraphs])
@pytest.mark.parametrize("run", TEXT_RUNS, ids=lambda run: run["name"])
def test_recorded_run(
    run: dict, make_graphs, poll_interval: int, model: LanguageModel, control, prompts, with_heads
) -> None:
    """A recorded run twice, with a shorter and a longer one beside it and after it."""
    with_heads(run["heads"])
    params, sampling = run["params"], sampling_of(run["params"])
    steps = params["max_new_tokens"]
    decoder = Decoder(model, control, max(p.length for p in prompts.values()) + steps + 9)
    uniforms = recorded_uniforms(run, sampling)

    def recorded() -> Generation:
        randomness = RecordedRandomness(uniforms, {})
        return Generation(decoder, prompts[run["prompt"]], "text", steps, sampling, randomness)

    def other(name: str, steps: int) -> Generation:
        others = sampling_of(SAMPLINGS[steps % 3])
        return Generation(decoder, prompts[name], "text", steps, others, SeededRandomness(steps))

    batch = TextBatch(decoder, 2, poll_interval, make_graphs)
    first, _, _, last = together(
        batch, [recorded(), other("text_only", 4), other("two_audio", steps + 9), recorded()]
    )
    assert first == last
    assert first[:2] == (run["returned_text"], run["n_forward"])


@pytest.fixture(scope="module")
def decoders(model: LanguageModel, prompts: dict, control) -> dict[str, Decoder]:
    """One for each way in which a model may be held; texts end early by a token they say."""
    quantized = language_model_component(GOLDEN / "llm")
    int8 = quantize_model(quantized.load(torch.device("cpu"), torch.float32), "int8")
    probe = Decoder(model, control, CAPACITY)
    often, _, _ = alone(Generation(probe, prompts["two_audio"], "text", 40, sampling_of({}),
                                   SeededRandomness(0)))  # fmt: skip
    ends = ControlTokens(control.blank, often[20], control.audio_ends)
    return {
        "full": Decoder(model, ends, CAPACITY),
        "track": Decoder(model.with_cut_heads(), ends, CAPACITY),
        "int8": Decoder(int8, ends, CAPACITY),
        "fp8 cache": Decoder(model, ends, CAPACITY, kv_cache="fp8"),
    }


requests = st.lists(
    st.tuples(
        st.sampled_from(["text_only", "two_audio"]),
        st.integers(1, 40),
        st.integers(0, 2**32 - 1),
        st.sampled_from(SAMPLINGS),
    ),
    max_size=6,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    requests=requests,
    slots=st.integers(1, 4),
    interval=st.integers(1, 12),
    held=st.sampled_from(["full", "track", "int8", "fp8 cache"]),
)
def test_ids_are_those_of_the_single_loop(
    requests, slots, interval, held, decoders: dict[str, Decoder], prompts: dict
) -> None:
    """Each with its own sampling, whatever the others have."""
    decoder = decoders[held]

    def generations() -> Iterator[Generation]:
        for name, steps, seed, params in requests:
            randomness, sampling = SeededRandomness(seed), sampling_of(params)
            yield Generation(decoder, prompts[name], "text", steps, sampling, randomness)

    expected = [alone(generation) for generation in generations()]
    batch = TextBatch(decoder, slots, interval)
    assert together(batch, list(generations())) == expected


def test_some_texts_end_and_others_do_not(decoders: dict[str, Decoder], prompts: dict) -> None:
    """What the property above is about does occur."""
    ends = set()
    for params in SAMPLINGS:
        for seed in range(4):
            randomness = SeededRandomness(seed)
            generation = Generation(
                decoders["full"], prompts["two_audio"], "text", 40, sampling_of(params), randomness
            )
            ends.add(alone(generation)[2])
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
    decoder, sampling = Decoder(says_zero, control, CAPACITY), sampling_of({})

    def generations() -> list[Generation]:
        return [
            Generation(decoder, prompts[name], "text", 30, sampling, SeededRandomness(0))
            for name in ("two_audio", "text_only")
        ]

    common = max(set(ids := alone(generations()[0])[0]), key=ids.count)
    head = says_zero.text_head.weight.data
    head[[0, common]] = head[[common, 0]]
    expected = [alone(generation) for generation in generations()]
    zeros = [[i == 0 for i in ids[:-1]] for ids, _, _ in expected]
    assert any(one != other for one, other in zip(*zeros, strict=True))
    batch = TextBatch(decoder, 3, 2, make_graphs)
    assert together(batch, generations()) == expected

    def embed_all(audio_ids: Tensor, text_ids: Tensor, *rest) -> Tensor:
        return original(audio_ids, text_ids, *rest) + (text_ids == 0).all() * says_zero.embedding(
            text_ids
        )

    original = says_zero.embed
    monkeypatch.setattr(says_zero, "embed", embed_all)
    assert [alone(generation) for generation in generations()] != expected


def test_steps_are_recorded_once_for_each_bucket(model: LanguageModel, control, prompts) -> None:
    decoder = Decoder(model, control, CAPACITY, buckets=(64, 80))
    sampling = sampling_of(SAMPLINGS[1])

    def generations() -> list[Generation]:
        return [
            Generation(decoder, prompts[name], "text", steps, sampling, SeededRandomness(steps))
            for name, steps in (("text_only", 20), ("two_audio", 40), ("text_only", 60))
        ]

    batch = TextBatch(decoder, 2, 5, TracedGraphs)
    expected = [alone(generation) for generation in generations()]
    assert together(batch, generations()) == expected
    recorded, replayed = batch.graphs.recorded, batch.graphs.replayed
    assert recorded == 6  # three ways to choose ids, and attention over 64, 80 and 100 positions
    assert together(batch, generations()) == expected
    assert (batch.graphs.recorded, batch.graphs.replayed) == (recorded, 2 * replayed)


def test_a_slot_that_is_released_early_disturbs_no_other(
    model: LanguageModel, control, prompts
) -> None:
    decoder, sampling = Decoder(model, control, CAPACITY), sampling_of({})

    def generation(name: str) -> Generation:
        return Generation(decoder, prompts[name], "text", 30, sampling, SeededRandomness(0))

    batch = TextBatch(decoder, 2, 4)
    stopped, kept, later = (generation(n) for n in ("two_audio", "text_only", "two_audio"))
    assert [batch.begin(stopped), batch.begin(kept)] == [0, 1]
    batch.advance()
    batch.release(0)
    assert (batch.running, len(stopped.text_ids)) == ([1], 4)
    assert [slot for slot, _ in batch.advance()] == [1]
    assert batch.begin(later) == 0
    while later.launched != later.max_steps:
        batch.advance()
    assert len(stopped.text_ids) == 4
    for name, done in (("text_only", kept), ("two_audio", later)):
        assert found(done) == alone(generation(name))


def test_what_is_finished_and_not_released_stays_as_it_is(
    decoders: dict[str, Decoder], prompts: dict
) -> None:
    decoder, sampling = decoders["full"], sampling_of({})

    def generation() -> Generation:
        return Generation(decoder, prompts["two_audio"], "text", 40, sampling, SeededRandomness(0))

    batch, kept = TextBatch(decoder, 1, 4), generation()
    batch.begin(kept)
    looks = [progress for _ in range(40) for _, progress in batch.advance()]
    assert found(kept) == alone(generation()) and kept.ended
    after = looks[[look.finished for look in looks].index(True) + 1 :]
    assert len(after) > 1 and not any(look.text_ids for look in after)


def test_what_does_not_fit_into_the_batch_is_refused(
    model: LanguageModel, control, prompts
) -> None:
    decoder, sampling = Decoder(model, control, CAPACITY), sampling_of({})

    def make(output: str) -> Generation:
        prompt, randomness = prompts["text_only"], SeededRandomness(0)
        return Generation(decoder, prompt, output, 5, sampling, randomness)

    batch = TextBatch(decoder, 1)
    with pytest.raises(ValueError, match="a batch generates text"):
        batch.begin(make("both"))
    batch.begin(make("text"))
    with pytest.raises(ValueError, match="no slot is free"):
        batch.begin(make("text"))


@pytest.mark.parametrize(("kv_cache", "size"), [("none", 4), ("fp8", 1)])
def test_bytes_of_a_slot(kv_cache: str, size: int, model: LanguageModel, control) -> None:
    """Keys and values of the trunk's 5 layers, 2 heads of 16."""
    decoder = Decoder(model, control, CAPACITY, kv_cache=kv_cache)
    for slots in (1, 3):
        batch = TextBatch(decoder, slots)
        assert batch.slot_bytes == 2 * 5 * 2 * 16 * CAPACITY * size
