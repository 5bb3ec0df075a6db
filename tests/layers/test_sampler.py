"""The sampler against recorded calls, and its distribution."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from kimia_infer.layers.sampler import (
    TrackSampling,
    draw,
    draw_weights,
    penalize_repetition,
    sample,
)


def test_recorded_calls(golden: Path) -> None:
    cases = json.loads((golden / "llm" / "sampler.json").read_text())
    tensors = load_file(golden / "llm" / "sampler.safetensors")
    assert cases
    for index, case in enumerate(cases):
        logits = tensors[f"{index}.logits"][0, -1]
        recent = tensors.get(f"{index}.recent", torch.zeros(0)).long()
        sampling = TrackSampling(
            case["temperature"], case["top_k"], case["repetition_penalty"], case["window"]
        )
        penalized = logits
        if case["repetition_penalty"] > 1 and len(recent) > case["window"]:
            penalized = penalize_repetition(
                logits, recent[-case["window"] :], case["repetition_penalty"]
            )
        after = tensors[f"{index}.logits_after"].reshape(-1, len(logits))[-1]
        torch.testing.assert_close(penalized, after, atol=1e-6, rtol=0)
        uniform = torch.zeros(1, dtype=torch.float64)
        if not case["greedy"]:
            weights, _ = draw_weights(penalized, case["temperature"], max(case["top_k"], 0))
            expected = tensors[f"{index}.probs_before_multinomial"].flatten()
            torch.testing.assert_close(weights, expected, atol=1e-5, rtol=0)
            # Aim at the middle of the span of index 2 (or the last one).
            shares = expected.double() / expected.double().sum()
            target = min(2, len(shares) - 1)
            uniform = (shares[:target].sum() + shares[target] / 2).view(1)
        token = sample(logits, recent, torch.tensor([len(recent)]), uniform, sampling)
        assert token.item() == case["token_if_draw_index_2"], index


@given(
    st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=40).filter(lambda w: sum(w) > 0),
    st.floats(0, 1, exclude_max=True),
)
def test_draw_is_the_inverse_cdf(weights: list[float], uniform: float) -> None:
    share = np.asarray(weights, dtype=np.float64)
    expected = np.searchsorted((share / share.sum()).cumsum(), uniform, side="right")
    actual = draw(torch.tensor(weights), torch.tensor([uniform], dtype=torch.float64))
    assert actual.item() == min(expected, len(weights) - 1)


def test_draw_follows_the_published_distribution() -> None:
    """Over an even grid of uniforms every id is drawn in proportion to softmax(logits / T)."""
    logits = torch.tensor([2.0, -1.0, 0.5, 1.5, -3.0])
    temperature, draws = 0.7, 20_000
    grid = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    sampling = TrackSampling(temperature, 3, 1.0, 16)
    history = torch.zeros(0, dtype=torch.int64)
    step = torch.tensor([0])
    ids = torch.cat([sample(logits, history, step, u.view(1), sampling) for u in grid])
    top = logits.topk(3)
    expected = torch.zeros(5)
    expected[top.indices] = torch.softmax(top.values / temperature, 0)
    frequency = torch.bincount(ids, minlength=5) / draws
    torch.testing.assert_close(frequency, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("window", "chosen"), [(0, 1), (2, 1), (3, 0), (4, 0)])
def test_the_penalty_needs_more_history_than_its_window(window: int, chosen: int) -> None:
    """Three recent ids: a window of 0 is all of them, as the published slicing has it."""
    logits, history = torch.tensor([3.0, 2.9, 1.0, -1.0]), torch.tensor([0, 0, 0])
    sampling = TrackSampling(0.0, 5, 2.0, window)
    uniform = torch.zeros(1, dtype=torch.float64)
    step = torch.tensor([len(history)])
    assert sample(logits, history, step, uniform, sampling).item() == chosen
