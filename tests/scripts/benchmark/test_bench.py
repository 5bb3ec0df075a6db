"""scripts/bench as a user runs it: whole on a small size, and its usage."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.benchmark.runner import MEASUREMENTS
from tests.paths import MINI, ROOT

BENCH = [sys.executable, str(ROOT / "scripts" / "bench")]
QUICK = "cold_start"

# What a machine with PyTorch and transformers alone does not have.
BARE = """
import sys
for name in ("pydantic", "tiktoken", "soxr", "av", "cog", "peft", "accelerate", "jiwer"):
    sys.modules[name] = None
"""


def bench(*arguments, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [*BENCH, *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=600,
        env=os.environ | environment,
    )  # fmt: skip


def test_everything_where_little_is_installed(tmp_path: Path, long: bool) -> None:
    """A rehearsal of the whole command; without ``--long`` of one measurement, up to an answer."""
    (tmp_path / "sitecustomize.py").write_text(BARE)
    arguments = ["--random", "tiny", "--everything", "out", "--device", "cpu"]
    arguments += ["--threads", 1, "--steps", 64, "--runs", 1]
    kimi = [name for name, m in MEASUREMENTS.items() if m.model == "kimi"]
    names = kimi if long else [QUICK]
    if not long:
        arguments += ["--only", QUICK]
    done = bench(*arguments, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["about"]["dtype"] == "float32" and results["about"]["threads"] == 1
    assert list(results["measurements"]) == names
    assert (tmp_path / "out" / "trace.json.gz").is_file() == long
    report = (tmp_path / "out" / "report.md").read_text()
    expected = ["warm-up"]
    if long:
        expected += ["first speech, ms", "steps/s", "int4 against none", "promised, GB"]
    for words in expected:
        assert words in report and words in done.stdout
    again = bench(*arguments, cwd=tmp_path)
    assert again.returncode == 0 and "measurements" not in again.stderr
    assert "### " not in again.stdout  # all of it is in the folder


def test_a_checkpoint(golden: Path, tmp_path: Path, long: bool) -> None:
    question = golden / "e2e" / "audio" / "station.wav"
    words = {
        "int8": ("int8 against none: whole requests", "divergence"),
        "requests": ("prefill", "| text  |"),
        "cold_start": ("files may be cached",),
    }
    names = list(words) if long else ["int8"]
    arguments = ["--weights", MINI, "--audio", question, "--only", ",".join(names)]
    done = bench(*arguments, "--threads", 1, "--steps", 64, "--runs", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for expected in (word for name in names for word in words[name]):
        assert expected in done.stdout


def test_language_model_alone(golden: Path, tmp_path: Path) -> None:
    """A checkpoint without its other components still gets its decode steps measured."""
    arguments = ["--weights", golden / "llm", "--only", "decode,requests", "--threads", 1]
    done = bench(*arguments, "--device", "cpu", "--steps", 64, "--runs", 1, cwd=tmp_path)
    assert done.returncode == 1
    assert "bench: decode: done" in done.stderr and "bench: requests: failed" in done.stderr
    assert "CheckpointError" in done.stderr and "Decode steps" in done.stdout


def test_concurrency(tmp_path: Path) -> None:
    arguments = ["--random", "tiny", "--concurrency", "1", "--json", "c.json", "--plot", "c.png"]
    arguments += ["--device", "cpu", "--threads", 1, "--steps", 64, "--runs", 1]
    done = bench(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "3/3" in done.stderr, "a bar shows the answers"
    results = json.loads((tmp_path / "c.json").read_text())
    assert list(results["measurements"]) == ["batches", "concurrency"]
    (table,) = results["measurements"]["concurrency"]["tables"]
    assert [(row["clients"], row["answers"]) for row in table["rows"]] == [(1, 1), (1, 1)]
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_command_keeps_what_is_done(tmp_path: Path) -> None:
    arguments = ["--random", "tiny", "--only", "encoders,concurrency", "--concurrency", "2"]
    arguments += ["--device", "cpu", "--threads", "1", "--runs", "20", "--json", "c.json"]
    process = subprocess.Popen(
        [*BENCH, *arguments], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    # Until the next measurement has begun.
    while not process.stdout.readline().startswith("| encoder"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors.splitlines()[-1] == "bench: interrupted"
    assert list(json.loads((tmp_path / "c.json").read_text())["measurements"]) == ["encoders"]


def test_a_killed_command_leaves_no_process(tmp_path: Path) -> None:
    command = [*BENCH, "--random", "tiny", "--everything", "out", "--only", "long_run"]
    bench = subprocess.Popen([*command, "--device", "cpu"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    worker = None
    while worker is None:
        assert bench.poll() is None
        children = Path(f"/proc/{bench.pid}/task/{bench.pid}/children").read_text().split()
        worker = int(children[0]) if children else None
    bench.kill()
    bench.wait()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{worker}").exists() and "Z" not in state_of(worker):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def state_of(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected --weights"),
        (("--random", "tiny", "--steps", 3), "--steps"),
        (
            ("--random", "tiny", "--concurrency", "1,0"),
            "--concurrency: expected numbers of clients",
        ),
        (("--server", "http://127.0.0.1:1", "--only", "decode"), "--server"),
        (("--random", "tiny", "--only", "int2"), "--only: expected some of references, kernels"),
        (("--weights", ".", "--audio", "missing.wav"), "missing.wav"),
        (("--everything", "/proc/none"), "bench: --everything: /proc/none: "),
    ],
)
def test_usage(arguments: tuple, message: str, tmp_path: Path) -> None:
    done = bench(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr


def test_help_names_every_measurement(tmp_path: Path) -> None:
    shown = bench("--help", cwd=tmp_path)
    assert shown.returncode == 0 and "examples:" in shown.stdout
    assert all(name in shown.stdout for name in MEASUREMENTS)
