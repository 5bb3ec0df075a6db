"""The language model and its sampler against recordings of the published code."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from kimia_infer.models.step_audio_editx import language_model, packing
from kimia_infer.models.step_audio_editx.config import LanguageModelConfig
from kimia_infer.models.step_audio_editx.language_model import LanguageModel
from kimia_infer.models.step_audio_editx.sampling import AudioRange, ban_repetition, generate
from tests.models.step_audio_editx.recorded import tensors, values

GOLDEN, SAMPLING = tensors("lm_golden"), values("lm_sampling")
PROMPT = GOLDEN["prompt"].tolist()


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    network = LanguageModel(LanguageModelConfig.model_validate(values("lm_config")))
    network.load_state_dict(tensors("lm"))
    return network.eval().requires_grad_(False)


def states(network: LanguageModel, ids: Tensor) -> list[Tensor]:
    cache = network.new_cache(len(ids))
    return network.hidden_states(ids, torch.arange(len(ids)), len(ids), cache)


def test_hidden_states_and_logits_are_the_recorded_ones(model: LanguageModel) -> None:
    found = states(model, GOLDEN["prompt"])
    assert len(found) == 4
    for index, state in enumerate(found):
        assert (state - GOLDEN[f"hidden_{index}"]).abs().max() < 1e-5
    assert (model.lm_head(found[-1]) - GOLDEN["logits"]).abs().max() < 2e-5


def test_bfloat16_is_as_near_as_bfloat16_gets(model: LanguageModel) -> None:
    half = copy.deepcopy(model).bfloat16()
    found = half.lm_head(states(half, GOLDEN["prompt"])[-1])
    assert (found.float() - GOLDEN["logits_bf16"].float()).abs().max() < 0.2
    assert (found.float() - GOLDEN["logits"]).abs().max() < 0.2


def test_slopes_and_bias_are_the_recorded_ones() -> None:
    for heads in (6, 40, 48):
        found = torch.tensor(language_model.slopes(heads))
        assert (found - GOLDEN[f"slopes_{heads}"]).abs().max() < 1e-7
    positions, half = torch.arange(9), torch.tensor(language_model.slopes(6))
    bias = language_model.distance_bias(positions, 9, half, torch.float32)
    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    assert (bias - GOLDEN["alibi_6_len9"])[:, seen].abs().max() < 1e-6
    assert bias[:, ~seen].eq(-torch.inf).all()
    last = torch.tensor([199])
    slopes = torch.tensor(language_model.slopes(48))
    bias = language_model.distance_bias(last, 200, slopes, torch.float32)[:, 0]
    assert (bias - GOLDEN["alibi_48_lastrow_len200"]).abs().max() < 1e-6


def test_parts_of_a_prompt_and_steps_give_what_the_whole_gives(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_model, "PREFILL_TOKENS", 16)
    cache = model.new_cache(64)
    assert (model.read(PROMPT[:-2], cache) - GOLDEN["logits"][-3]).abs().max() < 2e-5
    for place in (-2, -1):
        logits = model.step(GOLDEN["prompt"][place, None], len(PROMPT) + place, cache)
        assert (logits - GOLDEN["logits"][place]).abs().max() < 2e-5


def test_greedy_ids_are_the_recorded_ones(model: LanguageModel) -> None:
    found = list(generate(model, PROMPT, torch.zeros(20), end=-1, top_k=1))
    assert found == GOLDEN["greedy"].tolist()


@dataclass(frozen=True)
class Only:
    """Allows some ids, at every place."""

    ids: list[int] | None

    def mask(self, logits: Tensor, place: int) -> Tensor:
        if self.ids is None:
            return logits
        kept = torch.full_like(logits, -torch.inf)
        kept[self.ids] = logits[self.ids]
        return kept


@pytest.mark.parametrize("case", SAMPLING["sampled"] + SAMPLING["sampled_top_k"])
def test_sampled_ids_are_the_recorded_ones(model: LanguageModel, case: dict[str, Any]) -> None:
    scaled = copy.deepcopy(model)
    scaled.lm_head.weight *= case["logit_scale"]
    only: Any = Only(case.get("allowed_ids"))
    uniforms = torch.tensor(case["uniforms"], dtype=torch.float64)
    kept = case.get("top_k") or model.config.vocabulary
    found = generate(scaled, PROMPT, uniforms, -1, only, case["temperature"], kept)
    assert list(found) == case["tokens"]


@pytest.mark.parametrize("case", SAMPLING["ban_cases"], ids=lambda case: str(case["context"]))
def test_the_last_id_is_banned_as_recorded(case: dict[str, list[int]]) -> None:
    found = ban_repetition(torch.zeros(20), torch.tensor(case["context"]))
    assert found.isinf().nonzero().flatten().tolist() == case["banned"]


def test_the_end_ends_an_answer(model: LanguageModel) -> None:
    greedy = GOLDEN["greedy"].tolist()
    found = list(generate(model, PROMPT, torch.zeros(20), end=greedy[4], top_k=1))
    assert found == greedy[:4]


def test_only_audio_can_be_drawn_where_that_is_asked_for() -> None:
    """Every place of a group takes its tokenizer's codes; the end stands behind a group."""
    first, size = 100, 100 + packing.AUDIO_TOKENS
    audio = AudioRange(first, end=3)
    second = first + packing.VQ02_CODES
    for place in range(11):
        allowed = audio.mask(torch.zeros(size), place).isfinite().nonzero().flatten().tolist()
        expected = range(first, second) if place % 5 < 2 else range(second, size)
        ends = [3] if place in (5, 10) else []
        assert allowed == [*ends, *expected]
