"""What quantization costs the miniature in words, on a spoken world made for it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from scripts.miniature.scoring import (
    answer_all,
    load_model,
    read_cases,
    right,
    word_errors,
)
from scripts.miniature.spoken_world import WorldSize, write_world
from scripts.miniature.world import core
from tests.encoded import encode_like, encode_once
from tests.paths import MINI

KINDS = ("transcription", "question")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, long: bool) -> Path:
    folder = tmp_path_factory.mktemp("world")
    held_out = 200 if long else 60
    size = WorldSize(1, 1, held_out, held_out_voices=1)
    write_world(folder, size, core)
    return folder


@pytest.fixture(scope="module")
def words(world: Path, long: bool):
    """Word error rate of transcripts and part of the answers that are right, by way of serving."""
    cases = read_cases(world / "held_out.jsonl", KINDS, 40 if long else 8)
    plain = load_model(MINI)
    encode_once(plain)

    @cache
    def measured(quantization: str | None, kv_cache: str | None) -> tuple[float, float]:
        model = load_model(MINI, quantization=quantization, kv_cache=kv_cache)
        encode_like(model, plain)  # the language model alone is quantized
        given = answer_all(model, cases)
        heard, asked = ([a for a in given if a.case.kind == kind] for kind in KINDS)
        return word_errors(heard), right(asked)

    return measured


@pytest.mark.parametrize(
    ("quantization", "kv_cache", "more_errors", "fewer_right"),
    [
        ("int8", None, 0.01, 0.02),
        ("fp8", None, 0.01, 0.02),
        ("int4", None, 0.03, 0.05),
        (None, "fp8", 0.03, 0.05),
    ],
    ids=["int8", "fp8", "int4", "fp8 cache"],
)
def test_words_stay(
    quantization: str | None, kv_cache: str | None, more_errors: float, fewer_right: float, words
) -> None:
    errors, answered = words(None, None)
    assert errors <= 0.05 and answered >= 0.75
    found, found_right = words(quantization, kv_cache)
    assert found <= errors + more_errors
    assert found_right >= answered - fewer_right
