"""Measurements of Step-Audio-EditX on the smallest random networks."""

from __future__ import annotations

import pytest
import torch
from matplotlib.figure import Figure

from kimia_infer.utils.errors import ConfigurationError
from scripts.benchmark import editx
from scripts.benchmark.bench import Bench
from scripts.benchmark.editx_networks import NumberTokenizer
from scripts.benchmark.picture import stages_of
from scripts.benchmark.report import Table
from scripts.benchmark.runner import Setup

STEPS = 60
"""Two chunks of the flow."""


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(Setup(size="tiny", device="cpu", steps=STEPS, runs=1))


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(editx, "SECONDS", 2)
    monkeypatch.setattr(editx, "POSITIONS", (20, 40))
    monkeypatch.setattr(editx, "VARIANTS", ("none", "int8"))


def only(tables: list[Table]) -> Table:
    (table,) = tables
    assert not table.problems
    return table


def test_every_stage_of_a_clone_is_measured(bench: Bench) -> None:
    table = only(editx.stages(bench))
    rows = {row["stage"]: row for row in table.rows}
    for stage in editx.STAGES:
        assert rows[stage]["cold, s"] > 0 and rows[stage]["warm, s"] > 0
    assert rows["VQ02"]["reference kept, s"] is None and rows["decode"]["reference kept, s"] > 0
    parts = sum(rows[stage]["warm, s"] for stage in editx.STAGES if stage != "total")
    assert parts <= rows["total"]["warm, s"]
    assert rows["VQ02 + VQ06"] == {"stage": "VQ02 + VQ06", editx.PROJECTED_COLUMN: 20.0}
    assert f"{STEPS} of answer" in table.notes[0] and "only the total" in table.notes[1]
    figure = stages_of(table.rows, {"model": "random"})
    assert isinstance(figure, Figure) and len(figure.axes[0].get_yticklabels()) == 6


def test_one_pass_is_measured_beside_the_loop(bench: Bench) -> None:
    table = only(editx.vq02_loop(bench))
    assert [row["VQ02"] for row in table.rows] == ["one pass", "loop over chunks, as published"]
    count = int(table.notes[0].split()[0])
    assert table.notes[0].startswith(f"{count} rows, {count} codes equal")


def test_a_step_is_measured_beside_one_with_all_pairs(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    race = editx.race

    def watched(*arguments):
        results.append(race(*arguments))
        return results[-1]

    monkeypatch.setattr(editx, "race", watched)
    table = only(editx.decode_bias(bench))
    assert [row["position"] for row in table.rows] == [20, 40]
    for found in results:
        ours, published = (logits for _, _, logits in found.values())
        torch.testing.assert_close(ours, published, atol=1e-5, rtol=0)


def test_chunks_are_measured_beside_one_piece(bench: Bench) -> None:
    table = only(editx.streaming(bench))
    assert [row["first chunk, tokens"] for row in table.rows] == [STEPS, 45]
    assert table.notes[0].startswith("one piece: neighbouring frames are")


def test_variants_clone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(variant: str, device: torch.device) -> None:
        if variant == "bnb-nf4":
            raise ConfigurationError("quantization: no bitsandbytes")

    monkeypatch.setattr(editx, "VARIANTS", (*editx.VARIANTS, "bnb-nf4"))
    monkeypatch.setattr(editx, "check_variant", check)
    table = only(editx.compare_variants(bench))
    sizes = [row["language model, GB"] for row in table.rows]
    assert sizes[0] > max(sizes[1:]) and all(row["total, CPU s"] > 0 for row in table.rows)
    assert len(sizes) == 2 and table.notes[1] == "Without bnb-nf4: quantization: no bitsandbytes"


def test_names_of_audio_tokens_are_ids_of_their_own() -> None:
    tokenizer = NumberTokenizer(6144, turn_end=3)
    assert tokenizer.encode("a<audio_0>\n<audio_5119>") == [97, 1024, 10, 6143]
