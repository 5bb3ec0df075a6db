"""The comparison of adapters, on a small model: one adapter of each task, and the tables."""

from __future__ import annotations

from typing import Any

import pytest

from kimia_infer.models.kokoro.adapters.config import SEAMS
from scripts.benchmark.phoneme_sentences import SENTENCES
from scripts.benchmark.prosody_adapters import Bench, Budget, Study, markdown, plan
from tests.models.kokoro.tiny import SYMBOLS, tiny_directory


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    model = tiny_directory(tmp_path_factory.mktemp("kokoro"))
    voices = {"voices": ("af_heart",), "unheard": "bf_emma"}
    budget = Budget(4, 2, 2, 2, 1e-3, 2)
    return Bench(Study(model, **voices, voice="af_heart", teacher="am_adam", budget=budget))


def rows(bench: Bench, task: str, wanted: tuple[str, str]) -> list[dict[str, Any]]:
    """The rows that a run adds which finds all adapters but the wanted one done."""
    known = [("lstm", "all")]
    for adapter in plan(task):
        kind = f"{adapter.method} {adapter.cell or ''}".strip()
        known.append((kind, "all" if adapter.seams == SEAMS else adapter.seams[0]))
    assert wanted in known
    done = [{"task": task, "kind": kind, "seams": seams} for kind, seams in known]
    return list(bench.run(task, [row for row in done if (row["kind"], row["seams"]) != wanted]))


def test_every_kind_is_compared_at_every_seam() -> None:
    replacing, styled = list(plan("replace")), list(plan("style"))
    assert len(replacing) == 3 * (len(SEAMS) + 1)
    assert len(styled) == 4 * (len(SEAMS) + 1)


def test_the_model_agrees_with_itself(bench: Bench) -> None:
    (row,) = rows(bench, "replace", ("lstm", "all"))
    assert (row["equal"], row["length"]) == (1, 1)
    assert row["cents"] == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize(
    ("task", "wanted"),
    [("replace", ("replace cfc", "lstm")), ("style", ("residual mamba", "shared"))],
)
def test_a_row_has_all_figures(bench: Bench, task: str, wanted: tuple[str, str]) -> None:
    (row,) = rows(bench, task, wanted)
    assert row["parameters"] > 0 and row["frames_ms"] > 0 and row["energy_deviation"] > 0
    assert 0 <= row["equal"] <= row["within_one"] <= 1
    table = markdown([row])
    assert f"## {task}" in table
    assert f"| {wanted[0]} | {wanted[1]} | {row['parameters']:,} |" in table


def test_sentences_are_phonemes() -> None:
    assert len(SENTENCES) == 24
    assert not set("".join(SENTENCES)) - set(SYMBOLS)
