"""The command: its usage, its exit status, and a data set from directory to table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.parameters import Parameters
from kimia_infer.commands import evaluate
from kimia_infer.data.manifests import METRICS
from kimia_infer.data.recipes import RECIPES
from tests.command_line import run_here
from tests.evaluation.helpers import Write
from tests.paths import MINI
from tests.training.runs import write_sound


def test_a_data_set_becomes_a_table(
    tmp_path: Path,
    write: Write,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """A recipe and a manifest with a missing sound, together; then the same again."""
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "TUT"
    (data / "audio").mkdir(parents=True)
    (data / "meta.txt").write_text("audio/1.wav\tcafe/restaurant\naudio/2.wav\tbeach\n")
    for number in (1, 2):
        write_sound(data / "audio" / f"{number}.wav", 0.3, number)
    manifest = write({"audio": "missing.wav", "text": "x", "language": "en"}, name="Mine")
    arguments = [
        manifest.name, "--recipe", "tut2017", "--data", "TUT", "--weights", MINI,
        "--output", "out", "--device", "cpu", "--max-new-tokens", 5, "--quantization", "int8",
    ]  # fmt: skip
    assert run_here("evaluate", *arguments) == 1
    first = capsys.readouterr()
    assert "out/report.md: 2 answered, 1 errors, 0 lines left out" in first.err
    assert "| **Mine** | WER ↓ | – | 1 | 1 |" in first.out
    assert "| **TUT2017** | Accuracy ↑ |" in first.out
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["settings"]["weights"] == str(MINI)
    assert found["settings"]["quantization"] == found["model"]["quantization"] == "int8"
    monkeypatch.setattr(KimiAudio, "__init__", lambda *given, **named: pytest.fail("loaded again"))
    assert run_here("evaluate", *arguments) == 1
    assert capsys.readouterr().out == first.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "o", "--weights", "w"], "nothing to evaluate"),
        (["m.jsonl", "--output", "o"], "--weights is missing"),
        (["--recipe", "mmau", "--output", "o", "--weights", "w"], "needs its own --data"),
        (["m.jsonl", "--output", "o", "--weights", "w"], "m.jsonl: cannot be read"),
        (["m", "--output", "o", "--weights", "w", "--batch-size", "0"], "--batch-size must be at"),
    ],
)
def test_usage(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KIMI_AUDIO_WEIGHTS", raising=False)
    assert run_here("evaluate", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_the_command_knows_all_metrics_recipes_and_defaults():
    """They are repeated there, as help needs no package that has to be installed."""
    assert set(evaluate.METRICS) == METRICS.keys()
    assert set(evaluate.RECIPES) == RECIPES.keys()
    defaults = Parameters()
    for name, (kind, default) in evaluate.SAMPLING.items():
        assert default == (0 if name == "seed" else getattr(defaults, name))
        assert type(default) is kind
