"""The recorded tiny language model, its prompts and runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kimia_infer.engine.generation import ControlTokens, DecodeInput
from kimia_infer.layers.sampler import Sampling, TrackSampling
from kimia_infer.models.kimi_audio.language_model import LanguageModel, language_model_component
from tests.paths import GOLDEN

RUNS = json.loads((GOLDEN / "llm" / "generate.json").read_text())


@pytest.fixture(scope="session")
def recorded(golden: Path) -> dict[str, torch.Tensor]:
    return load_file(golden / "llm" / "forward.safetensors")


@pytest.fixture(scope="session")
def model(golden: Path) -> LanguageModel:
    return language_model_component(golden / "llm").load(torch.device("cpu"), torch.float32)


@pytest.fixture(scope="session")
def features(recorded: dict[str, torch.Tensor]) -> torch.Tensor:
    """The Whisper features of all recorded audio spans, in order."""
    names = sorted(n for n in recorded if n.startswith("prefill.whisper_feature."))
    return torch.cat([recorded[name] for name in names])


@pytest.fixture(scope="module")
def control(golden: Path) -> ControlTokens:
    ids = json.loads((golden / "llm" / "special_tokens.json").read_text())
    return ControlTokens(
        ids["kimia_text_blank"], ids["kimia_text_eos"], (ids["msg_end"], ids["media_end"])
    )


@pytest.fixture(scope="module")
def prompts(golden: Path) -> dict[str, DecodeInput]:
    return read_prompts(golden)


def read_prompts(golden: Path) -> dict[str, DecodeInput]:
    """The recorded prompts by name."""
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
def with_heads(model: LanguageModel):
    """Put recorded replacement heads in place for one test."""
    original = model.text_head.weight.data, model.audio_head.weight.data
    yield lambda name: put_heads(model, name)
    model.text_head.weight.data, model.audio_head.weight.data = original


def put_heads(model: LanguageModel, name: str) -> None:
    heads = load_file(GOLDEN / "llm" / "heads.safetensors")
    for head, stored in ((model.text_head, "lm_head"), (model.audio_head, "mimo_output")):
        if f"{name}.{stored}.weight" in heads:
            head.weight.data = heads[f"{name}.{stored}.weight"]


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
