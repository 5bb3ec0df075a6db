"""Random weights of every size make a whole KimiAudio that never ends an answer early."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.models.kimi_audio.config import FRAMES_PER_CODE
from kimia_infer.utils.errors import ConfigurationError
from scripts.benchmark import requests
from scripts.benchmark.random_models import random_components
from scripts.benchmark.requests import (
    QUESTION_SECONDS,
    REQUESTS,
    answer,
    default_question,
    least_lead,
    measure_first,
    measure_requests,
)
from scripts.benchmark.sizes import SIZES
from scripts.benchmark.speech import decode_while_speaking, speaking

CPU = torch.device("cpu")
REPLY_SECONDS = 4
"""Two chunks of the longest kind begin in it."""


def tiny_model(dtype: torch.dtype) -> KimiAudio:
    components = random_components(SIZES["tiny"], CPU, dtype)
    return KimiAudio.from_components(components, head_rows="track")


@pytest.fixture(scope="module", autouse=True)
def _short_answers() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(requests, "REPLY_SECONDS", REPLY_SECONDS)
        yield


@pytest.fixture(scope="module")
def model() -> KimiAudio:
    return tiny_model(torch.float32)


@pytest.mark.parametrize("name", SIZES)
def test_components_fit_together(name: str) -> None:
    sizes = SIZES[name]
    model = sizes.language_model
    assert sizes.speech_tokenizer.codebook_size == model.vocab_size - model.token_offset
    assert sizes.whisper.d_model * FRAMES_PER_CODE == model.adaptor_input_dim
    assert sizes.dit.codes >= sizes.speech_tokenizer.codebook_size


@pytest.mark.parametrize("kind", REQUESTS)
def test_answers_have_full_length(kind: str, model: KimiAudio) -> None:
    completion = answer(model, default_question(), REQUESTS[kind])
    metrics = completion.metrics
    assert metrics["input_audio_seconds"] == QUESTION_SECONDS
    assert metrics["text_tokens"] == metrics["decode_steps"]
    assert completion.text
    if kind != "text":
        assert metrics["output_audio_seconds"] == REPLY_SECONDS
        assert metrics["first_audio_seconds"] < metrics["total_seconds"]
        assert metrics["least_lead_seconds"] < REPLY_SECONDS


def test_answer_in_bfloat16() -> None:
    completion = answer(tiny_model(torch.bfloat16), default_question(), REQUESTS["speech"])
    assert completion.metrics["output_audio_seconds"] == REPLY_SECONDS


def test_lead_of_the_latest_chunk() -> None:
    """The second chunk comes 0.5 s early; the third 1 s late, when 3 s have been played."""
    assert least_lead([(10.0, 200), (11.5, 100), (14.0, 500)], sample_rate=100) == -1.0
    assert least_lead([(10.0, 200), (11.5, 100)], sample_rate=100) == 0.5


def test_requests_by_stage(model: KimiAudio) -> None:
    table = measure_requests(model, default_question(), runs=1)
    rows = {row[""]: row for row in table.rows}
    assert list(rows["total"])[1:] == list(REQUESTS)
    factor = rows["total"]["speech"] / rows["output audio"]["speech"]
    assert rows["real-time factor"]["speech"] == pytest.approx(factor)
    assert rows["real-time factor"]["text"] is None
    stages = sum(rows[name]["text"] for name in ("encoders", "prefill", "decode"))
    assert 0 < stages < rows["total"]["text"]


def test_first_text_and_sound(model: KimiAudio) -> None:
    text, speech, early = measure_first(model, default_question(), runs=1).rows
    assert text["first speech, ms"] is None and text["first text, ms"] > 0
    for row in (speech, early):
        assert row["first speech, ms"] > row["first text, ms"] > 0


def test_unknown_head_rows_are_refused() -> None:
    components = random_components(SIZES["tiny"], CPU, torch.float32)
    with pytest.raises(ConfigurationError, match="head_rows"):
        KimiAudio.from_components(components, head_rows="half")


def test_components_keep_their_full_heads() -> None:
    """The plain loop reads the language model that the components hold."""
    components = random_components(SIZES["tiny"], CPU, torch.float32)
    model = KimiAudio.from_components(components, head_rows="track")
    vocabulary = components.language_model.config.vocab_size
    assert len(components.language_model.audio_head.weight) == vocabulary
    assert len(model.language_model.audio_head.weight) < vocabulary


def test_decoding_while_speaking() -> None:
    components = random_components(SIZES["tiny"], CPU, torch.float32)
    table = decode_while_speaking(components.language_model, components.detokenizer, 64, runs=2)
    assert [row["decode steps"] for row in table.rows] == ["alone", "while speaking"]
    for row in table.rows:
        assert row["steps/s"] == pytest.approx(1e3 / row["ms/step"])


def test_speech_goes_on_while_it_is_asked_for() -> None:
    detokenizer = random_components(SIZES["tiny"], CPU, torch.float32).detokenizer
    with speaking(detokenizer) as real_time_factor:
        pass
    assert real_time_factor() > 0
