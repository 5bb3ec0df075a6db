"""The baseline of the speed comparison chooses the recorded tokens, as the library does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kimia_infer.engine.decode import ControlTokens, DecodeInput
from kimia_infer.models.kimi_audio.language_model import LanguageModel, language_model_component
from scripts.benchmark.plain_language_model import PlainGeneration
from tests.paths import GOLDEN

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


@pytest.fixture(scope="module")
def control(golden: Path) -> ControlTokens:
    ids = json.loads((golden / "llm" / "special_tokens.json").read_text())
    return ControlTokens(
        ids["kimia_text_blank"], ids["kimia_text_eos"], (ids["msg_end"], ids["media_end"])
    )


def prompt_of(golden: Path, name: str) -> DecodeInput:
    tensors = load_file(golden / "llm" / "prompts.safetensors")
    features = [tensors[k] for k in sorted(tensors) if k.startswith(f"{name}.feat.")]
    mask = tensors.get(f"{name}.mask")
    return DecodeInput(
        tensors[f"{name}.audio_ids"].view(1, -1),
        tensors[f"{name}.text_ids"].view(1, -1),
        None if mask is None else mask.view(1, -1),
        torch.cat(features) if features else None,
    )


def model_with_heads(golden: Path, name: str) -> LanguageModel:
    model = language_model_component(golden / "llm").load(torch.device("cpu"), torch.float32)
    heads = load_file(golden / "llm" / "heads.safetensors")
    for module, stored in ((model.text_head, "lm_head"), (model.audio_head, "mimo_output")):
        if f"{name}.{stored}.weight" in heads:
            module.weight.data = heads[f"{name}.{stored}.weight"]
    return model


@pytest.mark.parametrize("run", GREEDY_RUNS, ids=lambda run: run["name"])
def test_recorded_run(run: dict, golden: Path, control: ControlTokens) -> None:
    params = run["params"]
    generation = PlainGeneration(
        model_with_heads(golden, run["heads"]),
        prompt_of(golden, run["prompt"]),
        control,
        params["max_new_tokens"],
    )
    for _ in generation.run():
        pass
    assert generation.text_ids == run["returned_text"]
    assert generation.audio_ids == run["returned_audio"]
    assert generation.launched == run["n_forward"]


def test_layers_of_the_library_are_not_used(
    golden: Path, control: ControlTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be faster than plain ones; only their parameters are read."""

    def refuse(*arguments) -> None:
        raise AssertionError("a layer of the library was called")

    model = language_model_component(golden / "llm").load(torch.device("cpu"), torch.float32)
    for module in (*model.layers, *model.mimo_layers, model.text_head, model.audio_head):
        for layer in module.modules():
            monkeypatch.setattr(layer, "forward", refuse)
    ids = torch.ones(1, 3, dtype=torch.int64)
    generation = PlainGeneration(model, DecodeInput(ids, ids), control, 2)
    for _ in generation.run():
        pass
    assert generation.launched
