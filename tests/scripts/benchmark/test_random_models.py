"""Random weights of every size make a whole KimiAudio that never ends an answer early."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.models.kimi_audio.detokenizer import Detokenizer
from kimia_infer.models.kimi_audio.whisper import FRAMES_PER_CODE
from kimia_infer.utils.errors import RequestError
from scripts.benchmark import overlap, report
from scripts.benchmark.random_models import random_components
from scripts.benchmark.requests import (
    QUESTION_SECONDS,
    REPLY_SECONDS,
    REQUESTS,
    answer,
    least_lead,
    measure_requests,
    usual_question,
)
from scripts.benchmark.sizes import SIZES

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest) -> KimiAudio:
    components = random_components(SIZES["tiny"], CPU, getattr(torch, request.param))
    return KimiAudio.from_components(components, head_rows="track")


@pytest.mark.parametrize("name", SIZES)
def test_parts_fit_together(name: str) -> None:
    sizes = SIZES[name]
    model = sizes.language_model
    assert sizes.speech_tokenizer.codebook_size == model.vocab_size - model.token_offset
    assert sizes.whisper.d_model * FRAMES_PER_CODE == model.adaptor_input_dim
    assert sizes.dit.codes >= sizes.speech_tokenizer.codebook_size


@pytest.mark.parametrize("kind", REQUESTS)
def test_answers_have_full_length(kind: str, model: KimiAudio) -> None:
    completion = answer(model, usual_question(), REQUESTS[kind])
    metrics = completion.metrics
    assert metrics["input_audio_seconds"] == QUESTION_SECONDS
    assert metrics["text_tokens"] == metrics["decode_steps"]
    assert completion.text
    if kind != "text":
        assert metrics["output_audio_seconds"] == REPLY_SECONDS
        assert metrics["first_audio_seconds"] < metrics["total_seconds"]
        assert metrics["least_lead_seconds"] < REPLY_SECONDS


def test_lead_of_the_latest_chunk() -> None:
    """The second chunk comes 0.5 s early; the third 1 s late, when 3 s have been played."""
    assert least_lead([(10.0, 200), (11.5, 100), (14.0, 500)], sample_rate=100) == -1.0
    assert least_lead([(10.0, 200), (11.5, 100)], sample_rate=100) == 0.5


def test_speeds_follow_from_the_metrics(model: KimiAudio) -> None:
    rows = {row["name"]: row for row in measure_requests(model, usual_question(), runs=1)}
    assert list(rows) == list(REQUESTS)
    metrics = rows["speech"]["metrics"]
    factor = metrics["total_seconds"] / metrics["output_audio_seconds"]
    assert rows["speech"]["real_time_factor"] == pytest.approx(factor)
    assert "real_time_factor" not in rows["text"]
    assert rows["text"]["steps_per_second"] > 0


def test_unknown_head_rows_are_refused() -> None:
    components = random_components(SIZES["tiny"], CPU, torch.float32)
    with pytest.raises(RequestError, match="head_rows"):
        KimiAudio.from_components(components, head_rows="half")


def test_components_keep_their_full_heads() -> None:
    """The plain loop reads the language model that the components hold."""
    components = random_components(SIZES["tiny"], CPU, torch.float32)
    model = KimiAudio.from_components(components, head_rows="track")
    vocabulary = components.language_model.config.vocab_size
    assert len(components.language_model.audio_head.weight) == vocabulary
    assert len(model.language_model.audio_head.weight) < vocabulary


def test_decoding_while_speaking(monkeypatch: pytest.MonkeyPatch) -> None:
    components = random_components(SIZES["tiny"], CPU, torch.float32)
    speaking, take_turn = overlap.speaking, overlap.Contender.take_turn
    talks, turns = False, []

    @contextmanager
    def watched_speaking(detokenizer: Detokenizer) -> Iterator[Callable[[], float]]:
        nonlocal talks
        with speaking(detokenizer) as real_time_factor:
            talks = True
            yield real_time_factor
        talks = False

    def watched_turn(contender: overlap.Contender, steps: int | None) -> bool:
        turns.append((contender.name, talks))
        return take_turn(contender, steps)

    monkeypatch.setattr(overlap, "speaking", watched_speaking)
    monkeypatch.setattr(overlap.Contender, "take_turn", watched_turn)
    found = overlap.decode_while_speaking(
        components.language_model, components.detokenizer, 64, runs=2
    )
    assert turns == 2 * [("alone", False), ("while speaking", True)]
    assert found["real_time_factor"] > 0
    for row in found["modes"]:
        assert row["steps_per_second"] == pytest.approx(1 / row["step_seconds"])
    assert "while speaking" in report.table({"speaking": found}, "speaking")
