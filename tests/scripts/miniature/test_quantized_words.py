"""What quantization costs the miniature in words, on a spoken world made for it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from scripts.miniature.scoring import (
    Serving,
    answer,
    load_model,
    read_cases,
    right,
    transcribed,
)
from scripts.miniature.spoken_world import WorldSize, write_world
from tests.paths import MINI

KINDS = ("transcription", "question")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, long: bool) -> Path:
    folder = tmp_path_factory.mktemp("world")
    held_out = 200 if long else 60
    size = WorldSize(train=5, validation=5, held_out=held_out, held_out_voices=5, voice_held_out=6)
    write_world(folder, size, processes=1)
    return folder


@pytest.fixture(scope="module")
def words(world: Path, long: bool):
    """Word error rate of transcripts and part of the answers that are right, by way of serving."""
    cases = read_cases(world / "held_out.jsonl", world, KINDS, 40 if long else 8)

    @cache
    def measured(serving: Serving) -> tuple[float, float]:
        model = load_model(MINI, serving=serving)
        chosen = {kind: [case for case in cases if case.kind == kind] for kind in KINDS}
        given = {kind: [answer(model, case) for case in chosen[kind]] for kind in KINDS}
        errors = transcribed(chosen["transcription"], given["transcription"])
        return errors, right(chosen["question"], given["question"])

    return measured


@pytest.mark.parametrize(
    ("serving", "more_errors", "fewer_right"),
    [
        (Serving("int8"), 0.01, 0.02),
        (Serving("fp8"), 0.01, 0.02),
        (Serving("int4"), 0.03, 0.05),
        (Serving(kv_cache="fp8"), 0.03, 0.05),
    ],
    ids=["int8", "fp8", "int4", "fp8 cache"],
)
def test_words_stay(serving: Serving, more_errors: float, fewer_right: float, words) -> None:
    errors, answered = words(Serving())
    assert errors <= 0.05 and answered >= 0.75
    found, found_right = words(serving)
    assert found <= errors + more_errors
    assert found_right >= answered - fewer_right
