"""A run answers every item once, whatever happens to it, and reports what it found."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import jiwer
import pytest

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.request import Request, Response
from kimia_infer.audio.files import load_audio, wav_bytes
from kimia_infer.evaluation import answering
from kimia_infer.evaluation.items import Defaults, Manifest, read_manifest
from kimia_infer.evaluation.results import EvaluationConfig, EvaluationError, open_results
from kimia_infer.evaluation.run import evaluate
from kimia_infer.utils.errors import RequestError
from tests.evaluation.helpers import (
    CONFIG,
    SAMPLING,
    Run,
    Write,
    answers,
    assert_same,
    report,
    results,
)
from tests.paths import MINI, ROOT
from tests.training.runs import write_sound

SCRIPT = ROOT / "scripts" / "evaluate"


def test_answers_are_those_of_generate(finished: Path, model: KimiAudio, manifest: Manifest):
    given = answers(finished)
    assert len(given) == len(manifest.items) == 9
    for item, row in zip(manifest.items, given, strict=True):
        if "error" not in row and item.span is None:
            _, text = model.generate(item.messages, output_type="text", **SAMPLING)
            assert row["answer"] == text


def test_a_span_of_a_recording_is_cut_out(
    finished: Path, recordings: Path, model: KimiAudio, manifest: Manifest
):
    item = manifest.items[-1]
    wave = load_audio(recordings / "long.wav")[3200:9600]  # 0.2 to 0.6 s at 16 kHz
    messages = [item.messages[0], item.messages[1] | {"content": wav_bytes(wave, 16_000)}]
    _, text = model.generate(messages, output_type="text", **SAMPLING)
    assert answers(finished)[-1]["answer"] == text


def test_what_cannot_be_answered_is_counted_and_named(finished: Path, run: Run):
    summary = run("finished")
    assert (summary.answered, summary.errors, summary.faults) == (8, 1, 1)
    found = report(finished)
    (error,) = found["errors"]
    assert (error["subset"], error["id"]) == ("other", "4")
    assert "missing.wav" in error["error"]
    (fault,) = found["left_out"]
    assert "set.jsonl:5: reference: missing or empty" in fault


def test_report_has_the_scores_of_its_answers(finished: Path):
    by_group = {
        (part["dataset"], part["subset"], part["metric"]): part
        for part in report(finished)["results"]
    }
    assert list(by_group) == [
        ("set", "clean", "wer"),
        ("set", "other", "wer"),
        ("set", "", "cer"),
        ("set", "", "accuracy"),
        ("set", "", "match"),
        ("set", "", "none"),
        ("Excerpts", "", "wer"),
    ]
    rows = [row for row in answers(finished) if row["subset"] == "clean"]
    scored = [row["score"] for row in rows]
    expected = 100 * jiwer.wer([s["reference"] for s in scored], [s["answer"] for s in scored])
    clean, other = by_group["set", "clean", "wer"], by_group["set", "other", "wer"]
    assert clean["score"] == pytest.approx(expected)
    assert (clean["items"], clean["errors"], clean["reference_length"]) == (2, 0, 5)
    assert (other["items"], other["errors"], other["reference_length"]) == (2, 1, 1)
    assert by_group["set", "", "none"]["score"] is None


def test_report_says_how_it_came_about(finished: Path, model: KimiAudio):
    found = report(finished)
    assert found["settings"]["weights"] == str(MINI)
    assert found["settings"]["sampling"] == SAMPLING
    assert found["model"]["device"] == "cpu"
    assert found["model"]["head_rows"] == "track"
    assert found["environment"]["jiwer"] == importlib.metadata.version("jiwer")
    speed = found["speed"]
    # 0.9 s four times, 0.3 s three times, and the 0.4 s that are cut out.
    assert speed["audio_seconds"] == pytest.approx(4 * 0.9 + 3 * 0.3 + 0.4)
    assert speed["real_time_factor"] * speed["audio_seconds"] == pytest.approx(
        speed["processing_seconds"]
    )
    assert speed["latency_seconds"]["max"] <= speed["processing_seconds"]


def test_table_has_subsets_side_by_side(finished: Path):
    text = (finished / "report.md").read_text()
    clean, other, *_ = report(finished)["results"]
    scores = f"{clean['score']:.2f} \\| {other['score']:.2f}"
    assert f"| **set** clean \\| other | WER ↓ | {scores} | 2 \\| 2 | 0 \\| 1 |" in text
    assert "missing.wav" in text
    assert "set.jsonl:5" in text


@pytest.mark.parametrize(("stop", "torn"), [(0, 0), (1, 25), (3, 1), (7, 0)])
def test_interrupted_run_goes_on(
    finished: Path,
    tmp_path: Path,
    run: Run,
    model: KimiAudio,
    monkeypatch: pytest.MonkeyPatch,
    stop: int,
    torn: int,
):
    """``stop`` requests are answered before the interruption; the missing file needs none."""
    original, asked = model.begin, []

    def interrupted(request: Request) -> Response:
        if len(asked) == stop:
            raise KeyboardInterrupt
        asked.append(request)
        return original(request)

    monkeypatch.setattr(model, "begin", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("cut")
    path = tmp_path / "cut" / "results.jsonl"
    done = results(tmp_path / "cut")
    assert done == stop + (stop > 2)  # the fourth item is the one without a file
    if torn:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - torn)
        done -= 1
    again = []
    monkeypatch.setattr(model, "begin", lambda r: (again.append(r), original(r))[1])
    run("cut")
    assert len(again) == (9 - done) - (done < 4)
    assert_same(finished, tmp_path / "cut")


def test_finished_run_needs_no_model(finished: Path, manifest: Manifest):
    before = report(finished)

    def load(config: EvaluationConfig) -> KimiAudio:
        raise AssertionError("loaded for nothing")

    evaluate([manifest], CONFIG, finished, load)
    assert report(finished) == before


def test_killed_run_goes_on(tmp_path: Path, model: KimiAudio, write: Write):
    write_sound(tmp_path / "a.wav", 0.5, 0)
    path = write(*({"audio": "a.wav", "text": f"number {n}"} for n in range(24)))
    command = [sys.executable, str(SCRIPT), str(path), "--language=en", f"--weights={MINI}"]
    command += ["--device=cpu", "--max-new-tokens=6", f"--output={tmp_path / 'cut'}"]
    command += ["--batch-size=4"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None and results(tmp_path / "cut") < 5:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 5 <= results(tmp_path / "cut") < 24
    stored = json.loads((tmp_path / "cut" / "settings.json").read_text())["settings"]
    del stored["items_sha256"]
    config = EvaluationConfig(**stored)
    manifest = read_manifest(path, Defaults(tmp_path, language="en"))
    for folder in ("cut", "whole"):
        evaluate([manifest], config, tmp_path / folder, lambda config: model)
    assert results(tmp_path / "cut") == 24
    assert_same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sampling": SAMPLING | {"max_new_tokens": 7}}, "sampling"),
        ({"weights": "other"}, "weights"),
        ({"limit": 3}, "limit"),
    ],
)
def test_other_settings_need_another_directory(finished: Path, run: Run, change: dict, named: str):
    with pytest.raises(EvaluationError, match=f"contains results with {named}"):
        run("finished", CONFIG.model_copy(update=change))


def test_other_items_need_another_directory(finished: Path, model: KimiAudio, manifest: Manifest):
    fewer = Manifest(manifest.items[1:])
    with pytest.raises(EvaluationError, match="contains results with other items"):
        evaluate([fewer], CONFIG, finished, lambda config: model)


def test_a_model_that_runs_otherwise_needs_another_directory(finished: Path, manifest: Manifest):
    path = finished / "results.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    full = KimiAudio(str(MINI), load_detokenizer=False, device="cpu")
    with pytest.raises(EvaluationError, match="contains results with head_rows 'track'"):
        evaluate([manifest], CONFIG, finished, lambda config: full)


@pytest.mark.usefixtures("missing_file")
def test_errors_are_asked_again_on_request(finished: Path, run: Run):
    assert run("finished").errors == 1
    assert run("finished", retry_errors=True).errors == 0
    assert results(finished) == 10
    assert report(finished)["errors"] == []


def test_limit_takes_the_first_items(tmp_path: Path, run: Run):
    outcome = run("out", CONFIG.model_copy(update={"limit": 2}))
    assert outcome.answered == 2
    assert [row["id"] for row in answers(tmp_path / "out")] == ["1", "2"]


def test_several_manifests_share_a_table(
    tmp_path: Path, model: KimiAudio, write: Write, sound: Path
):
    row = {"audio": sound.name, "text": "x", "language": "en"}
    paths = [write(row, name="First"), write(row, name="Second")]
    manifests = [read_manifest(path, Defaults(tmp_path)) for path in paths]
    outcome = evaluate(manifests, CONFIG, tmp_path / "out", lambda config: model)
    text = outcome.report.read_text()
    assert "| **First** | WER ↓ |" in text
    assert "| **Second** | WER ↓ |" in text
    with pytest.raises(EvaluationError, match="First: item '1' is in two manifests"):
        evaluate([manifests[0]] * 2, CONFIG, tmp_path / "b", lambda config: model)


def test_one_run_at_a_time(tmp_path: Path, run: Run):
    with open_results(tmp_path / "out"), pytest.raises(EvaluationError, match="another run"):
        run("out")
    assert run("out").answered == 8


def test_damaged_results_are_named(finished: Path, run: Run):
    path = finished / "results.jsonl"
    path.write_text('{"key": ["set"]}\n' + path.read_text())
    with pytest.raises(EvaluationError, match=r"results.jsonl:1: damaged"):
        run("finished")


def test_failures_that_are_no_answers_end_the_run(
    tmp_path: Path, model: KimiAudio, run: Run, monkeypatch: pytest.MonkeyPatch
):
    def fail(request: Request) -> Response:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(model, "begin", fail)
    with pytest.raises(RuntimeError, match="the device is gone"):
        run("out")
    monkeypatch.undo()
    assert run("out").answered == 8


def test_a_run_that_never_began_leaves_its_directory_free(
    tmp_path: Path, manifest: Manifest, run: Run
):
    def load(config: EvaluationConfig) -> KimiAudio:
        raise RequestError("no such weights")

    wrong = CONFIG.model_copy(update={"weights": "typo"})
    with pytest.raises(RequestError, match="no such weights"):
        evaluate([manifest], wrong, tmp_path / "out", load)
    assert run("out").answered == 8


def test_settings_are_checked_before_anything_is_written(tmp_path: Path, run: Run):
    with pytest.raises(RequestError, match="text_temperature"):
        run("out", CONFIG.model_copy(update={"sampling": {"text_temperature": -1}}))
    assert not (tmp_path / "out").exists()


def test_recordings_are_loaded_ahead_but_not_all(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
):
    loaded = []
    monkeypatch.setattr(
        answering, "load_audio", lambda *given: (loaded.append(given), load_audio(*given))[1]
    )
    pairs = answering.load_ahead([manifest.items[0]] * 20, 600.0)
    next(pairs)
    pairs.close()
    assert 1 <= len(loaded) <= answering.AHEAD


def test_a_span_after_the_end_is_an_error(manifest: Manifest):
    item = dataclasses.replace(manifest.items[-1], span=(5.0, 6.0))
    (turn,) = answering.load_ahead([item], 600.0)
    assert "ends at 0.90 s, before 5 to 6 s" in str(turn.waves)
