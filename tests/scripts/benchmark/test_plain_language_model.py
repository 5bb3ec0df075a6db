"""The baseline of the speed comparison chooses the recorded tokens, as the library does."""

from __future__ import annotations

import json

import pytest
import torch

from kimia_infer.engine.generation import DecodeInput
from kimia_infer.models.kimi_audio.language_model import LanguageModel, language_model_component
from scripts.benchmark.plain_language_model import PlainGeneration
from scripts.benchmark.references import recorded_control, recorded_prompt, use_recorded_heads
from tests.paths import GOLDEN

CPU = torch.device("cpu")

SAMPLED = {
    f"{track}_{name}"
    for track in ("text", "audio")
    for name in ("temperature", "repetition_penalty")
}


def is_plain_greedy(run: dict) -> bool:
    """Temperature 0 and no penalty are the defaults of a recorded run."""
    return not any(run["params"].get(name) for name in SAMPLED)


RUNS = json.loads((GOLDEN / "llm" / "generate.json").read_text())
SPOKEN = [run for run in RUNS if run["params"]["output_type"] == "both"]
GREEDY_RUNS = [run for run in SPOKEN if is_plain_greedy(run)]


def golden_model() -> LanguageModel:
    return language_model_component(GOLDEN / "llm").load(CPU, torch.float32)


@pytest.mark.parametrize("run", GREEDY_RUNS, ids=lambda run: run["name"])
def test_recorded_run(run: dict) -> None:
    model = golden_model()
    use_recorded_heads(model, run["heads"])
    prompt = recorded_prompt(run["prompt"], CPU)
    steps = run["params"]["max_new_tokens"]
    generation = PlainGeneration(model, prompt, recorded_control(), steps)
    for _ in generation.run():
        pass
    assert generation.text_ids == run["returned_text"]
    assert generation.audio_ids == run["returned_audio"]
    assert generation.launched == run["n_forward"]


def test_layers_of_the_library_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be faster than plain ones; only their parameters are read."""

    def refuse(*arguments) -> None:
        raise AssertionError("a layer of the library was called")

    model = golden_model()
    for module in (*model.layers, *model.mimo_layers, model.text_head, model.audio_head):
        for layer in module.modules():
            monkeypatch.setattr(layer, "forward", refuse)
    ids = torch.ones(1, 3, dtype=torch.int64)
    generation = PlainGeneration(model, DecodeInput(ids, ids), recorded_control(), 2)
    for _ in generation.run():
        pass
    assert generation.launched
