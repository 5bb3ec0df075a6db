"""A run answers every item once, whatever happens to it, and reports what it found."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jiwer
import pytest

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.audio.decode import load_audio
from kimia_infer.audio.encode import wav_bytes
from kimia_infer.evaluation import answering, sounds
from kimia_infer.evaluation.items import EvaluationError
from kimia_infer.evaluation.journal import Journal
from kimia_infer.evaluation.manifest import Defaults, Manifest, read_manifest
from kimia_infer.evaluation.record import Settings
from kimia_infer.evaluation.run import Outcome, evaluate
from kimia_infer.utils.errors import RequestError
from tests.evaluation.conftest import Write
from tests.paths import MINI, ROOT
from tests.training.runs import write_sound

SCRIPT = ROOT / "scripts" / "evaluate"
SAMPLING = {"max_new_tokens": 6, "seed": 0}
SETTINGS = Settings(str(MINI), device="cpu", sampling=SAMPLING)
QUESTION = "What is it?\n(A) dog (B) cat"

Evaluate = Callable[..., Outcome]


@pytest.fixture
def manifest(tmp_path: Path, write: Write) -> Manifest:
    """Every metric, two subsets, a sound that is missing and a line that is bad."""
    write_sound(tmp_path / "long.wav", 0.9, 1)
    write_sound(tmp_path / "short.wav", 0.3, 2)
    path = write(
        {"audio": "long.wav", "text": "red green blue", "subset": "clean"},
        {"audio": "short.wav", "text": "dog cat", "subset": "clean"},
        {"audio": "short.wav", "text": "six", "subset": "other"},
        {"audio": "missing.wav", "text": "seven", "subset": "other"},
        {"audio": "short.wav", "text": "  "},
        {"audio": "short.wav", "text": "你好", "language": "zh"},
        {"audio": "long.wav", "question": QUESTION, "choices": ["dog", "cat"], "answer": "cat"},
        {"audio": "long.wav", "question": "Where?", "answer": "here", "metric": "match"},
        {"audio": "long.wav", "question": "", "metric": "none"},
        {"audio": "long.wav", "text": "two", "start": 0.2, "end": 0.6, "dataset": "Parts"},
    )
    return read_manifest(path, Defaults(tmp_path, language="en"))


@pytest.fixture
def run(tmp_path: Path, model: KimiAudio, manifest: Manifest) -> Evaluate:
    def run_into(folder: str, settings: Settings = SETTINGS, **more) -> Outcome:
        return evaluate([manifest], settings, tmp_path / folder, lambda settings: model, **more)

    return run_into


def report(tmp_path: Path, folder: str) -> dict:
    return json.loads((tmp_path / folder / "report.json").read_text())


def answers(tmp_path: Path, folder: str) -> list[dict]:
    lines = (tmp_path / folder / "answers.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_answers_are_those_of_generate(
    tmp_path: Path, model: KimiAudio, manifest: Manifest, run: Evaluate
):
    run("out")
    given = answers(tmp_path, "out")
    assert len(given) == len(manifest.items) == 9
    for item, row in zip(manifest.items, given, strict=True):
        if "error" not in row and item.span is None:
            _, text = model.generate(item.messages, output_type="text", **SAMPLING)
            assert row["answer"] == text


def test_a_part_of_a_sound_is_cut_out(
    tmp_path: Path, model: KimiAudio, manifest: Manifest, run: Evaluate
):
    run("out")
    item = manifest.items[-1]
    wave = load_audio(tmp_path / "long.wav")[3200:9600]  # 0.2 to 0.6 s at 16 kHz
    messages = [item.messages[0], item.messages[1] | {"content": wav_bytes(wave, 16_000)}]
    _, text = model.generate(messages, output_type="text", **SAMPLING)
    assert answers(tmp_path, "out")[-1]["answer"] == text


def test_what_cannot_be_answered_is_counted_and_named(tmp_path: Path, run: Evaluate):
    outcome = run("out")
    assert (outcome.answered, outcome.errors, outcome.faults) == (8, 1, 1)
    found = report(tmp_path, "out")
    (error,) = found["errors"]
    assert (error["subset"], error["id"]) == ("other", "4")
    assert "missing.wav" in error["error"]
    (fault,) = found["left_out"]
    assert "set.jsonl:5: reference: missing or empty" in fault


def test_report_has_the_scores_of_its_answers(tmp_path: Path, run: Evaluate):
    run("out")
    by_group = {
        (part["dataset"], part["subset"], part["metric"]): part
        for part in report(tmp_path, "out")["results"]
    }
    assert list(by_group) == [
        ("set", "clean", "wer"),
        ("set", "other", "wer"),
        ("set", "", "cer"),
        ("set", "", "accuracy"),
        ("set", "", "match"),
        ("set", "", "none"),
        ("Parts", "", "wer"),
    ]
    rows = [row for row in answers(tmp_path, "out") if row["subset"] == "clean"]
    scored = [row["score"] for row in rows]
    expected = 100 * jiwer.wer([s["reference"] for s in scored], [s["answer"] for s in scored])
    clean, other = by_group["set", "clean", "wer"], by_group["set", "other", "wer"]
    assert clean["score"] == pytest.approx(expected)
    assert (clean["items"], clean["errors"], clean["reference_length"]) == (2, 0, 5)
    assert (other["items"], other["errors"], other["reference_length"]) == (2, 1, 1)
    assert by_group["set", "", "none"]["score"] is None


def test_report_says_how_it_came_about(tmp_path: Path, model: KimiAudio, run: Evaluate):
    run("out")
    found = report(tmp_path, "out")
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


def test_table_has_subsets_side_by_side(tmp_path: Path, run: Evaluate):
    text = run("out").report.read_text()
    clean, other, *_ = report(tmp_path, "out")["results"]
    scores = f"{clean['score']:.2f} \\| {other['score']:.2f}"
    assert f"| **set** clean \\| other | WER ↓ | {scores} | 2 \\| 2 | 0 \\| 1 |" in text
    assert "missing.wav" in text
    assert "set.jsonl:5" in text


def same(tmp_path: Path, first: str, second: str) -> None:
    """Two runs agree in everything but time."""
    assert answers(tmp_path, first) == answers(tmp_path, second)
    one, other = report(tmp_path, first), report(tmp_path, second)
    for name in ("results", "errors", "left_out", "settings", "model"):
        assert one[name] == other[name]


@pytest.mark.parametrize(("stop", "torn"), [(0, 0), (1, 25), (3, 1), (8, 0)])
def test_interrupted_run_goes_on(
    tmp_path: Path, run: Evaluate, monkeypatch: pytest.MonkeyPatch, stop: int, torn: int
):
    run("whole")
    asked = []

    def answer(model: KimiAudio, item, *rest):
        if len(asked) == stop:
            raise KeyboardInterrupt
        asked.append(item.key)
        return original(model, item, *rest)

    original = answering._answer
    with monkeypatch.context() as patch:
        patch.setattr(answering, "_answer", answer)
        with pytest.raises(KeyboardInterrupt):
            run("cut")
    path = tmp_path / "cut" / "results.jsonl"
    assert len(path.read_text().splitlines()) == stop
    if stop and torn:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - torn)
        asked.pop()
    again = []
    monkeypatch.setattr(
        answering, "_answer", lambda m, i, *rest: (again.append(i.key), original(m, i, *rest))[1]
    )
    run("cut")
    assert len(asked + again) == len(set(asked + again)) == 9
    same(tmp_path, "whole", "cut")


def test_finished_run_needs_no_model(tmp_path: Path, manifest: Manifest, run: Evaluate):
    run("out")
    before = report(tmp_path, "out")

    def load(settings: Settings) -> KimiAudio:
        raise AssertionError("loaded for nothing")

    evaluate([manifest], SETTINGS, tmp_path / "out", load)
    assert report(tmp_path, "out") == before


@pytest.mark.parametrize("size", [1, 4])
def test_killed_run_goes_on(tmp_path: Path, model: KimiAudio, write: Write, size: int):
    write_sound(tmp_path / "a.wav", 0.5, 0)
    path = write(*({"audio": "a.wav", "text": f"number {n}"} for n in range(24)))
    command = [sys.executable, str(SCRIPT), str(path), "--language=en", f"--weights={MINI}"]
    command += ["--device=cpu", "--max-new-tokens=6", f"--output={tmp_path / 'cut'}"]
    command += [f"--batch-size={size}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    results = tmp_path / "cut" / "results.jsonl"
    while process.poll() is None and lines_of(results) < 5:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = lines_of(results)
    assert 5 <= done < 24
    stored = json.loads((tmp_path / "cut" / "settings.json").read_text())["settings"]
    del stored["items_sha256"]
    manifest = read_manifest(path, Defaults(tmp_path, language="en"))
    for folder in ("cut", "whole"):
        evaluate([manifest], Settings(**stored), tmp_path / folder, lambda settings: model)
    assert lines_of(results) == 24
    same(tmp_path, "whole", "cut")


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sampling": SAMPLING | {"max_new_tokens": 7}}, "sampling"),
        ({"weights": "other"}, "weights"),
        ({"limit": 3}, "limit"),
    ],
)
def test_other_settings_need_another_directory(run: Evaluate, change: dict, named: str):
    run("out")
    with pytest.raises(EvaluationError, match=f"holds results with {named}"):
        run("out", dataclasses.replace(SETTINGS, **change))


def test_other_items_need_another_directory(
    tmp_path: Path, model: KimiAudio, manifest: Manifest, run: Evaluate
):
    run("out")
    fewer = Manifest("set", manifest.items[1:])
    with pytest.raises(EvaluationError, match="holds results with other items"):
        evaluate([fewer], SETTINGS, tmp_path / "out", lambda settings: model)


def test_a_model_that_runs_otherwise_needs_another_directory(
    tmp_path: Path, manifest: Manifest, run: Evaluate
):
    run("out")
    path = tmp_path / "out" / "results.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    full = KimiAudio(str(MINI), load_detokenizer=False, device="cpu")
    with pytest.raises(EvaluationError, match="holds results with head_rows 'track'"):
        evaluate([manifest], SETTINGS, tmp_path / "out", lambda settings: full)


def test_a_directory_begun_before_there_were_variants_goes_on(
    tmp_path: Path, manifest: Manifest, run: Evaluate
):
    run("out")
    results, settings = (tmp_path / "out" / name for name in ("results.jsonl", "settings.json"))
    results.write_text(results.read_text().splitlines(keepends=True)[0])
    values = json.loads(settings.read_text())
    for part, name in (("settings", "quantization"), ("model", "quantization"),
                       ("model", "kv_cache")):  # fmt: skip
        del values[part][name]
    settings.write_text(json.dumps(values))
    assert run("out").answered == 8
    results.write_text(results.read_text().splitlines(keepends=True)[0])
    int8 = KimiAudio(
        str(MINI), False, device="cpu", dtype="float32", head_rows="track", quantization="int8"
    )
    with pytest.raises(EvaluationError, match="holds results with quantization 'none'"):
        evaluate([manifest], SETTINGS, tmp_path / "out", lambda settings: int8)


def test_errors_are_asked_again_on_request(tmp_path: Path, run: Evaluate):
    run("out")
    write_sound(tmp_path / "missing.wav", 0.3, 3)
    assert run("out").errors == 1
    assert run("out", retry_errors=True).errors == 0
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 10
    assert report(tmp_path, "out")["errors"] == []


def test_limit_takes_the_first_items(tmp_path: Path, run: Evaluate):
    outcome = run("out", dataclasses.replace(SETTINGS, limit=2))
    assert outcome.answered == 2
    assert [row["id"] for row in answers(tmp_path, "out")] == ["1", "2"]


def test_several_manifests_share_a_table(
    tmp_path: Path, model: KimiAudio, write: Write, sound: Path
):
    row = {"audio": sound.name, "text": "x", "language": "en"}
    paths = [write(row, name="First"), write(row, name="Second")]
    manifests = [read_manifest(path, Defaults(tmp_path)) for path in paths]
    outcome = evaluate(manifests, SETTINGS, tmp_path / "out", lambda settings: model)
    text = outcome.report.read_text()
    assert "| **First** | WER ↓ |" in text
    assert "| **Second** | WER ↓ |" in text
    with pytest.raises(EvaluationError, match="First: item '1' is in two manifests"):
        evaluate([manifests[0]] * 2, SETTINGS, tmp_path / "b", lambda settings: model)


def test_one_run_at_a_time(tmp_path: Path, run: Evaluate):
    (tmp_path / "out").mkdir()
    with Journal(tmp_path / "out"), pytest.raises(EvaluationError, match="another run"):
        run("out")
    assert run("out").answered == 8


def test_damaged_results_are_named(tmp_path: Path, run: Evaluate):
    run("out")
    path = tmp_path / "out" / "results.jsonl"
    path.write_text('{"key": ["set"]}\n' + path.read_text())
    with pytest.raises(EvaluationError, match=r"results.jsonl:1: damaged"):
        run("out")


def test_failures_that_are_no_answers_end_the_run(
    tmp_path: Path, model: KimiAudio, run: Evaluate, monkeypatch: pytest.MonkeyPatch
):
    def fail(request) -> Iterator:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(model, "answer", fail)
    with pytest.raises(RuntimeError, match="the device is gone"):
        run("out")
    monkeypatch.undo()
    assert run("out").answered == 8


def test_a_run_that_never_began_leaves_its_directory_free(
    tmp_path: Path, manifest: Manifest, run: Evaluate
):
    def load(settings: Settings) -> KimiAudio:
        raise RequestError("no such weights")

    wrong = dataclasses.replace(SETTINGS, weights="typo")
    with pytest.raises(RequestError, match="no such weights"):
        evaluate([manifest], wrong, tmp_path / "out", load)
    assert run("out").answered == 8


def test_settings_are_checked_before_anything_is_written(tmp_path: Path, run: Evaluate):
    with pytest.raises(RequestError, match="text_temperature"):
        run("out", dataclasses.replace(SETTINGS, sampling={"text_temperature": -1}))
    assert not (tmp_path / "out").exists()


def test_sounds_are_loaded_ahead_but_not_all(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
):
    loaded = []
    monkeypatch.setattr(
        sounds, "load_audio", lambda path, *rest: (loaded.append(path), load_audio(path, *rest))[1]
    )
    items = [manifest.items[0]] * 20
    pairs = sounds.load_ahead(items, 600.0)
    next(pairs)
    pairs.close()
    assert 1 <= len(loaded) <= sounds.AHEAD


def test_part_behind_the_end_is_an_error(tmp_path: Path, manifest: Manifest):
    item = dataclasses.replace(manifest.items[-1], span=(5.0, 6.0))
    ((_, loaded),) = sounds.load_ahead([item], 600.0)
    assert "ends at 0.90 s, before 5 to 6 s" in str(loaded.error)
