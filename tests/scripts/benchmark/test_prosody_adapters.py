"""The comparison of adapters, on a small model: trainings, their figures, and the tables."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kimia_infer.models.kokoro.adapters.config import SEAMS
from kimia_infer.models.kokoro.layers import Rows
from kimia_infer.utils.errors import CheckpointError
from kimia_infer.weights.adapter import WEIGHTS_NAME
from scripts.benchmark.phoneme_sentences import LONG, SHORT
from scripts.benchmark.prosody_adapters import FEW, Run, Study, Trainings, plan
from scripts.benchmark.prosody_figures import TEXTS, Candidate, Figures, candidates
from scripts.benchmark.prosody_report import report
from scripts.benchmark.prosody_sound import Listener
from scripts.benchmark.prosody_stages import fill, heard, rows
from tests.models.kokoro.tiny import SYMBOLS, narrow_kokoro


def run_of(study: Study, name: str) -> Run:
    return next(run for run in plan(study) if run.name == name)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with narrow_kokoro(tmp_path_factory.mktemp("kokoro")) as directory:
        yield directory


@pytest.fixture(scope="module")
def trainings(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    """With one cell instead of the LSTMs trained, and the style that it learns then."""
    folder = tmp_path_factory.mktemp("study")
    others = {"voices": ("af_heart",), "unheard": "bf_emma", "teacher": "am_adam"}
    study = Study(model, **others, strings=4, steps=2, few_steps=1, batch_size=2)  # pyrefly: ignore
    trainings = Trainings(study, folder)
    assert trainings.train(run_of(study, "replace-replace-cfc-all-4"))
    standing = replace(study, learning_rate=0.0)  # so that the style shows where it begins
    assert Trainings(standing, folder).train(run_of(study, "style-replace-cfc-all-4"))
    return trainings


@pytest.fixture
def figures(trainings: Trainings, monkeypatch: pytest.MonkeyPatch) -> Figures:
    for name in TEXTS:
        monkeypatch.setitem(TEXTS, name, SHORT[11:12])
    return Figures(trainings)


def test_every_kind_is_trained_at_every_lstm() -> None:
    runs = list(plan(Study(Path("model"))))
    assert len({run.name for run in runs}) == len(runs)
    assert len([run for run in runs if run.task == "replace"]) == 3
    whole = [run for run in runs if run.task == "style" and run.strings == 2000]
    assert len({(run.kind, run.seam) for run in whole}) == 7 + 4 * len(SEAMS)
    few = [run for run in runs if run.strings in FEW]
    assert len(few) == 4 * len(FEW) and all(run.seam == "all" for run in few)


def test_a_training_that_is_done_is_not_repeated(trainings: Trainings) -> None:
    missing = {run.name for run in trainings.missing()}
    assert missing == {run.name for run in plan(trainings.study)} - {
        "replace-replace-cfc-all-4",
        "style-replace-cfc-all-4",
    }


def test_a_style_is_learned_by_the_cells_that_learned_to_replace(trainings: Trainings) -> None:
    study = trainings.study
    begun, taught = (
        load_file(trainings.adapter(run_of(study, f"{task}-replace-cfc-all-4")) / WEIGHTS_NAME)
        for task in ("style", "replace")
    )
    assert all(torch.equal(value, taught[name]) for name, value in begun.items())


def test_a_single_cell_leaves_the_other_lstms(figures: Figures) -> None:
    (one,) = [c for c in candidates(figures.trainings) if c.seam == "lstm"]
    assert one.kind == "replace cfc"
    changed, plain = figures.predictor(one), figures.trainings.network.predictor
    for seam in SEAMS:
        same = type(changed.get_submodule(seam)) is type(plain.get_submodule(seam))
        assert same is (seam != "lstm")


def test_the_model_agrees_with_itself(figures: Figures) -> None:
    row = figures.measure(Candidate("replace", "lstm"))
    assert (row["short"]["equal"], row["unheard"]["length"]) == (1, 1)
    assert row["longest"]["cents"] == pytest.approx(0, abs=0.01)


def test_rows_are_measured_once_and_shown(figures: Figures, tmp_path: Path) -> None:
    found = [c for c in candidates(figures.trainings) if c.seam in ("all", "shared")]
    fill(tmp_path / "prosody", found, figures.measure)
    fill(tmp_path / "prosody", found, lambda _: pytest.fail("measured twice"))
    kept = rows(tmp_path / "prosody", found)
    assert [row["kind"] for row in kept] == ["lstm", "lstm", *["replace cfc"] * 3]
    whole, shared = (row["parameters"] for row in kept[2:4])
    assert whole == len(SEAMS) * shared > 0
    assert 0 <= kept[2]["unheard"]["equal"] <= kept[2]["unheard"]["within_one"] <= 1
    assert kept[3]["unheard"]["equal"] == 1, "frames alone were changed"
    sound = {"word_errors": 2.0, "naturalness": 3.456}
    ear = [{**one.labels, "short": sound, "longest": sound} for one in heard(found)]
    tables = report(kept, ear)
    assert f"| replace cfc | shared | {shared:,} |" in tables
    assert "| style | teacher | 2.0 | 3.46 | 2.0 | 3.46 |" in tables


def test_what_sound_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    with pytest.raises(CheckpointError, match=r"pip install faster-whisper==1\.2\.1"):
        Listener()


def test_sentences_are_read(trainings: Trainings) -> None:
    read = Figures(trainings).phonemes
    assert [len(read[name]) for name in TEXTS] == [len(SHORT), 4, 4] == [24, 4, len(LONG) - 4]
    assert not set("".join(text for texts in read.values() for text in texts)) - set(SYMBOLS)
    assert max(map(len, read["short"])) < min(map(len, read["longer"]))
    assert max(map(len, read["longer"])) < min(map(len, read["longest"]))


def test_a_string_is_encoded_once_for_all_voices(trainings: Trainings) -> None:
    bert = trainings.network.bert
    ids = torch.tensor([[0, 5, 6, 0]])
    first = bert.encode(ids, Rows())
    assert bert.encode(ids.clone(), Rows()) is first
