"""Code counts against recorded ones and against cutting the wave."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kimia_infer.models.kimi_audio.encoders import (
    SEGMENT_SAMPLES,
    as_samples,
    code_count,
    segment_codes,
    split_segments,
)
from tests.paths import GOLDEN

WHISPER = json.loads((GOLDEN / "whisper" / "meta.json").read_text())
CODES = json.loads((GOLDEN / "glm4" / "codes.json").read_text())
FILES = json.loads((GOLDEN / "e2e" / "cases.json").read_text())["audio_files"]


@pytest.mark.parametrize("name", WHISPER)
def test_recorded_segments(name: str) -> None:
    about = WHISPER[name]
    segments = split_segments(np.zeros(about["samples"], np.float32))
    assert [len(s) for s in segments] == about["segments"]
    assert [segment_codes(len(s)) for s in segments] == about["per_segment_token_len"]
    assert code_count(about["samples"]) == CODES[name]["n"]


@pytest.mark.parametrize("name", FILES)
def test_recorded_code_counts(name: str) -> None:
    assert code_count(FILES[name]["samples_at_16k"]) == len(FILES[name]["codes"])


@given(st.integers(1, 5 * SEGMENT_SAMPLES) | st.integers(1, 4).map(lambda n: n * SEGMENT_SAMPLES))
def test_count_is_the_sum_over_segments(samples: int) -> None:
    segments = split_segments(np.broadcast_to(np.float32(0), samples))
    assert sum(map(len, segments)) == samples
    assert all(len(s) == SEGMENT_SAMPLES for s in segments[:-1])
    assert code_count(samples) == sum(-(-len(s) // 1_280) for s in segments)


@pytest.mark.parametrize("samples", [0, -1])
def test_no_samples_have_no_count(samples: int) -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        code_count(samples)


@pytest.mark.parametrize(
    "wave",
    [
        np.zeros(0, np.float32),
        np.zeros((1, 5), np.float32),
        np.zeros(5, np.int16),
        torch.zeros(5, dtype=torch.int64),
    ],
    ids=["empty", "two dimensions", "integers", "integer tensor"],
)
def test_only_samples_are_taken(wave: np.ndarray | torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"shape \[samples\]"):
        as_samples(wave)
