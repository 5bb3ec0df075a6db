"""The token loop against every recorded run, and properties of its shortcuts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kimia_infer.language_model import decode
from kimia_infer.language_model.decode import ControlTokens, DecodeInput, Generation
from kimia_infer.language_model.model import LanguageModel
from kimia_infer.language_model.sampler import Sampling, TrackSampling, sample
from kimia_infer.randomness import SeededRandomness
from tests.conftest import GOLDEN
from tests.randomness import RecordedRandomness

RUNS = json.loads((GOLDEN / "llm" / "generate.json").read_text())


@pytest.fixture(scope="module")
def control(golden: Path) -> ControlTokens:
    ids = json.loads((golden / "llm" / "special_tokens.json").read_text())
    return ControlTokens(
        ids["kimia_text_blank"], ids["kimia_text_eos"], (ids["msg_end"], ids["media_end"])
    )


@pytest.fixture(scope="module")
def prompts(golden: Path) -> dict[str, DecodeInput]:
    tensors = load_file(golden / "llm" / "prompts.safetensors")
    prompts = {}
    for name in {key.split(".")[0] for key in tensors}:
        features = [tensors[k] for k in sorted(tensors) if k.startswith(f"{name}.feat.")]
        mask = tensors.get(f"{name}.mask")
        prompts[name] = DecodeInput(
            tensors[f"{name}.audio_ids"].view(1, -1),
            tensors[f"{name}.text_ids"].view(1, -1),
            None if mask is None else mask.view(1, -1),
            torch.cat(features) if features else None,
        )
    return prompts


@pytest.fixture
def with_heads(golden: Path, model: LanguageModel):
    """Put recorded replacement heads in place for one test."""
    heads = load_file(golden / "llm" / "heads.safetensors")
    original = model.text_head.weight.data, model.audio_head.weight.data

    def replace(name: str) -> None:
        model.text_head.weight.data = heads.get(f"{name}.lm_head.weight", original[0])
        model.audio_head.weight.data = heads.get(f"{name}.mimo_output.weight", original[1])

    yield replace
    model.text_head.weight.data, model.audio_head.weight.data = original


def sampling_of(params: dict) -> Sampling:
    def track(name: str, window: int) -> TrackSampling:
        return TrackSampling(
            params.get(f"{name}_temperature", 0.0),
            params.get(f"{name}_top_k", 5),
            params.get(f"{name}_repetition_penalty", 1.0),
            params.get(f"{name}_repetition_window_size", window),
        )

    return Sampling(audio=track("audio", 64), text=track("text", 16))


def recorded_uniforms(run: dict, sampling: Sampling) -> dict[tuple[str, int], float]:
    """Draws are recorded in order of consumption: per step text, then audio, if sampled."""
    order = [t for t in ("text", "audio") if not getattr(sampling, t).greedy]
    return {
        (order[i % len(order)], i // len(order)): drawn["u"]
        for i, drawn in enumerate(run.get("draws", []))
    }


@pytest.mark.parametrize("check_interval", [1, 7])
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run["name"])
def test_recorded_run(
    run: dict, check_interval: int, model: LanguageModel, control, prompts, with_heads
) -> None:
    with_heads(run["heads"])
    params, sampling = run["params"], sampling_of(run["params"])
    generation = Generation(
        model,
        prompts[run["prompt"]],
        control,
        params["output_type"],
        params["max_new_tokens"],
        sampling,
        RecordedRandomness(recorded_uniforms(run, sampling), {}),
        check_interval=check_interval,
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
    generation = Generation(model, prompt, control, "both", 50, sampling, SeededRandomness(0))
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

    def run(head_rows: str) -> tuple[list[int], list[int]]:
        generation = Generation(
            model, prompt, control, "both", 30, sampling, SeededRandomness(3), head_rows
        )
        for _ in generation.run():
            pass
        return generation.text_ids, generation.audio_ids

    cut = run("track")

    def sample_allowed(logits, history, step, uniform, track):
        rows = torch.arange(len(logits))
        allowed = (
            rows < config.token_offset if track is sampling.text else rows >= config.base_tokens
        )
        masked = torch.where(allowed, logits, -torch.inf)
        return sample(masked, history, step, uniform, track)

    monkeypatch.setattr(decode, "sample", sample_allowed)
    assert cut == run("full")
    assert all(i < config.token_offset for i in cut[0])
    assert all(i >= config.base_tokens for i in cut[1])
