"""The command that trains the miniature: finished stages are skipped, failures are reported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest

from scripts.miniature.stages import STAGES, result
from tests.paths import ROOT

COMMAND = ROOT / "scripts" / "train_mini"


def run(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
    )


def test_a_finished_run_is_reported(tmp_path: Path):
    for name in STAGES:
        result(tmp_path, name).mkdir(parents=True, exist_ok=True)
    finished = run(tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert f"{tmp_path / 'mini'}: done; 0.00 hours this time" in finished.stdout


def test_a_stage_that_fails_ends_the_run_and_says_where(tmp_path: Path):
    """The others that run already are waited for, no further one begins."""
    for name in ("world", "voice", "vocoder", "whisper", "kokoro", "people", "held_out", "prompts"):
        result(tmp_path, name).mkdir(parents=True)
    failed = run(tmp_path, "--jobs", 2)
    assert failed.returncode == 1
    log = tmp_path / "logs" / "tokenizer.log"
    assert f"train_mini: see {log}" in failed.stderr
    assert "tokenizer: FAILED after 0." in failed.stdout
    assert "speech_train.jsonl" in log.read_text()
    assert [path.name for path in log.parent.iterdir()] == ["tokenizer.log"]


def test_an_interruption_ends_the_stages_too(tmp_path: Path):
    """And the same command does not begin what another process still makes."""
    process = subprocess.Popen(
        [sys.executable, COMMAND, tmp_path, "--jobs", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    part, log = tmp_path / ".world.part", tmp_path / "logs" / "world.log"
    while not part.exists():
        assert process.poll() is None
        time.sleep(0.05)
    refused = run(tmp_path, "world")
    assert f"world: another process is making it in {tmp_path}" in refused.stderr
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; the same command resumes" in errors
    assert "train_mini: world: interrupted" in log.read_text()
    assert not (tmp_path / "world").exists()


def test_a_stage_out_of_order_is_refused(tmp_path: Path):
    refused = run(tmp_path, "detokenizer")
    assert refused.returncode == 1
    assert "train_mini: detokenizer: needs encoder to be done first\n" in refused.stderr


def test_a_wrong_miniature_to_begin_with_is_an_error(tmp_path: Path):
    refused = run(tmp_path / "run", "--from", tmp_path)
    assert refused.returncode == 1
    assert f"train_mini: --from {tmp_path}: no miniature" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interruption_that_python_ignores_comes_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """What a destructor raises is ignored, so the interruption has to be raised once more."""
    monkeypatch.syspath_prepend(str(COMMAND.parent))
    loader = SourceFileLoader("train_mini", str(COMMAND))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    train_mini = module_from_spec(spec)
    loader.exec_module(train_mini)
    monkeypatch.setattr(train_mini, "AGAIN_SECONDS", 0.2)

    class Destroyed:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0)  # where the signal is noticed

    def work() -> None:
        Destroyed()
        time.sleep(60)

    numbers = signal.SIGINT, signal.SIGALRM
    before = [signal.signal(number, train_mini.interrupt) for number in numbers]
    try:
        assert train_mini.attempt("world", work) == 130
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    assert "train_mini: world: interrupted" in capsys.readouterr().err
