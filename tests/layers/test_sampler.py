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
    RECORDED_FORMS,
    SamplingRows,
    TrackSampling,
    draw,
    draw_weights,
    form_of,
    penalize_repetition,
    sample,
)


def sample_rows(
    logits: torch.Tensor,
    history: torch.Tensor,
    step: int,
    uniforms: torch.Tensor,
    samplings: list[TrackSampling],
    recorded: bool = False,
) -> list[int]:
    """An id for each sampling, all of the same logits [ids] and history [steps]."""
    count = len(samplings)
    rows = SamplingRows.create(count, torch.device("cpu"))
    for row, sampling in enumerate(samplings):
        rows.put(row, sampling)
    steps = torch.full((count,), step)
    given = logits.expand(count, -1), history.expand(count, -1), steps, uniforms
    return sample(*given, rows, form_of(samplings, recorded)).tolist()


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
            penalty = torch.tensor([case["repetition_penalty"]])
            [penalized] = penalize_repetition(
                logits[None], recent[None, -case["window"] :], penalty
            )
        after = tensors[f"{index}.logits_after"].reshape(-1, len(logits))[-1]
        torch.testing.assert_close(penalized, after, atol=1e-6, rtol=0)
        uniform = torch.zeros(1, dtype=torch.float64)
        if not case["greedy"]:
            [weights] = draw_weights(penalized[None], torch.tensor([case["temperature"]]))
            if case["top_k"] > 0:
                weights = weights.topk(case["top_k"]).values
            expected = tensors[f"{index}.probs_before_multinomial"].flatten()
            torch.testing.assert_close(weights, expected, atol=1e-5, rtol=0)
            # Aim at the middle of the span of index 2 (or the last one).
            shares = expected.double() / expected.double().sum()
            target = min(2, len(shares) - 1)
            uniform = (shares[:target].sum() + shares[target] / 2).view(1)
        for recorded in (False, True):
            token = sample_rows(logits, recent, len(recent), uniform, [sampling], recorded)
            assert token == [case["token_if_draw_index_2"]], index


@given(
    st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=40).filter(lambda w: sum(w) > 0),
    st.floats(0, 1, exclude_max=True),
)
def test_draw_is_the_inverse_cdf(weights: list[float], uniform: float) -> None:
    share = np.asarray(weights, dtype=np.float64)
    expected = np.searchsorted((share / share.sum()).cumsum(), uniform, side="right")
    uniforms = torch.tensor([uniform], dtype=torch.float64)
    actual = draw(torch.tensor([weights]), uniforms, len(weights))
    assert actual.item() == min(expected, len(weights) - 1)


def test_draw_follows_the_published_distribution() -> None:
    """Over an even grid of uniforms every id is drawn in proportion to softmax(logits / T)."""
    logits = torch.tensor([2.0, -1.0, 0.5, 1.5, -3.0])
    temperature, draws = 0.7, 20_000
    grid = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    sampling = TrackSampling(temperature, 3, 1.0, 16)
    history = torch.zeros(0, dtype=torch.int64)
    ids = torch.tensor(sample_rows(logits, history, 0, grid, [sampling] * draws))
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
    assert sample_rows(logits, history, len(history), uniform, [sampling]) == [chosen]


samplings = st.builds(
    TrackSampling,
    st.sampled_from([0.0, 0.4, 1.0, 2.0]),
    st.sampled_from([0, 1, 5, 64, 65, 300, 5000]),
    st.sampled_from([1.0, 1.1, 2.0]),
    st.sampled_from([0, 1, 16, 40]),
)


@given(st.lists(samplings, min_size=1, max_size=6), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_rows_do_not_depend_on_each_other(rows: list[TrackSampling], step: int, seed: int) -> None:
    """An id is that of its row alone, in the form it needs as in those that are recorded."""
    torch.manual_seed(seed)
    logits, history = 3 * torch.randn(400), torch.randint(400, (40,))
    uniforms = torch.rand(len(rows), dtype=torch.float64)
    alone = [
        sample_rows(logits, history, step, uniforms[row, None], [sampling])[0]
        for row, sampling in enumerate(rows)
    ]
    for recorded in (False, True):
        assert sample_rows(logits, history, step, uniforms, rows, recorded) == alone
    assert RECORDED_FORMS[-1].covers(form_of(rows))
