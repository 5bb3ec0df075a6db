"""The token loop against every recorded run, and properties of its shortcuts."""

from __future__ import annotations

import random

import pytest
import torch

from kimia_infer.engine import decode
from kimia_infer.engine.decode import Decoder
from kimia_infer.engine.generation import ControlTokens, Generation
from kimia_infer.layers.sampler import SeededRandomness, sample
from kimia_infer.models.kimi_audio.language_model import LanguageModel
from kimia_infer.utils.graphs import graphs_for
from tests.engine.helpers import RUNS, recorded_uniforms, sampling_of
from tests.randomness import RecordedRandomness
from tests.traced import TracedGraphs


@pytest.mark.parametrize(("make_graphs", "poll_interval"), [(graphs_for, 7), (TracedGraphs, 1)])
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run["name"])
def test_recorded_run(
    run: dict, make_graphs, poll_interval: int, model: LanguageModel, control, prompts, with_heads
) -> None:
    with_heads(run["heads"])
    params, sampling = run["params"], sampling_of(run["params"])
    prompt, steps = prompts[run["prompt"]], params["max_new_tokens"]
    decoder = Decoder(model, control, prompt.length + steps, make_graphs=make_graphs)
    randomness = RecordedRandomness(recorded_uniforms(run, sampling), {})
    generation = Generation(
        decoder, prompt, params["output_type"], steps, sampling, randomness, poll_interval
    )
    seen = list(generation.run())
    assert [progress.finished for progress in seen] == [False] * (len(seen) - 1) + [True]
    assert [i for progress in seen for i in progress.text_ids] == run["returned_text"]
    assert [i for progress in seen for i in progress.audio_ids] == run["returned_audio"]
    assert generation.text_ids == run["returned_text"]
    assert generation.audio_ids == run["returned_audio"]
    assert generation.steps == run["n_forward"]


def test_stopping_early_launches_no_further_step(model: LanguageModel, control, prompts) -> None:
    prompt = next(iter(prompts.values()))
    sampling = sampling_of({})
    decoder = Decoder(model, control, prompt.length + 50)
    generation = Generation(decoder, prompt, "both", 50, sampling, SeededRandomness(0))
    run = generation.run()
    for progress in run:
        if progress.steps == 5:
            run.close()
            break
    assert generation.launched == 5
    assert len(generation.text_ids) <= 5


def test_cut_heads_choose_among_their_own_rows(
    model: LanguageModel, control, prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cutting the heads equals forbidding every id of the other track."""
    config, prompt = model.config, next(p for p in prompts.values() if p.features is not None)
    sampling = sampling_of({"audio_temperature": 0.9, "text_temperature": 0.8})

    def run(model: LanguageModel) -> tuple[list[int], list[int]]:
        decoder = Decoder(model, control, prompt.length + 30)
        generation = Generation(decoder, prompt, "both", 30, sampling, SeededRandomness(3))
        for _ in generation.run():
            pass
        return generation.text_ids, generation.audio_ids

    cut = run(model.with_cut_heads())

    def sample_allowed(logits, history, step, uniform, rows, form, first_id):
        ids, text = torch.arange(logits.shape[1]), rows.temperature == torch.tensor(0.8)
        allowed = torch.where(text, ids < config.token_offset, ids >= config.base_tokens)
        masked = torch.where(allowed, logits, -torch.inf)
        return sample(masked, history, step, uniform, rows, form, first_id)

    monkeypatch.setattr(decode, "sample", sample_allowed)
    assert cut == run(model)
    assert all(i < config.token_offset for i in cut[0])
    assert all(i >= config.base_tokens for i in cut[1])


@pytest.mark.parametrize("heads", ["full", "track"])
def test_one_answer_however_it_is_launched(
    heads: str, model: LanguageModel, control, prompts
) -> None:
    """Graphs or not, any interval, any bucket of attention, with and without layer skipping."""
    model = model.with_cut_heads() if heads == "track" else model
    prompt, steps = prompts[sorted(prompts)[0]], 40
    sampling = sampling_of({"audio_temperature": 0.9, "audio_repetition_penalty": 1.2})

    def decoder(text_end: int, make_graphs=graphs_for) -> Decoder:
        ends = ControlTokens(control.blank, text_end, control.audio_ends)
        capacity = prompt.length + steps
        return Decoder(model, ends, capacity, make_graphs=make_graphs, buckets=(16, 64))

    def run(decoder: Decoder, interval: int = 1, skip: bool = True) -> tuple[list[int], list[int]]:
        generation = Generation(
            decoder, prompt, "both", steps, sampling, SeededRandomness(5), interval
        )
        for _ in generation.run():
            if not skip:
                generation.tracks = decode.BOTH
        return generation.text_ids, generation.audio_ids

    text_end = run(decoder(-1))[0][4]  # the text track ends early, the other one goes on
    direct, recorded = decoder(text_end), decoder(text_end, TracedGraphs)
    expected = run(direct, skip=False)
    assert len(expected[0]) <= 4 < len(expected[1])
    for interval in (1, 3, 8, 100):
        assert run(direct, interval) == run(recorded, interval) == expected


def test_nothing_is_recorded_after_the_warm_up(model: LanguageModel, control, prompts) -> None:
    """Whatever a request asks for, and wherever in the cache it is."""
    decoder = Decoder(model, control, 90, make_graphs=TracedGraphs, buckets=(16, 64))
    recorded = decoder.graphs.recorded
    chance = random.Random(0)
    for seed in range(20):
        asked = {
            f"{track}_{name}": chance.choice(values)
            for track in ("text", "audio")
            for name, values in {
                "temperature": (0.0, 0.3, 1.7),
                "top_k": (0, 1, 10, 100, 1000),
                "repetition_penalty": (1.0, 1.1, 2.0),
                "repetition_window_size": (1, 16, 64, 7500),
            }.items()
        }
        prompt, steps = prompts[chance.choice(sorted(prompts))], chance.randint(1, 30)
        output, sampling = chance.choice(["text", "both"]), sampling_of(asked)
        generation = Generation(decoder, prompt, output, steps, sampling, SeededRandomness(seed))
        list(generation.run())
    assert decoder.graphs.recorded == recorded > 0


def test_a_request_beyond_the_capacity_is_refused(model: LanguageModel, control, prompts) -> None:
    prompt = prompts[sorted(prompts)[0]]
    decoder = Decoder(model, control, prompt.length + 3)
    with pytest.raises(ValueError, match="capacity"):
        Generation(decoder, prompt, "text", 4, sampling_of({}), SeededRandomness(0))
