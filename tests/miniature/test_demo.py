"""The command that a newcomer runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.paths import ROOT


def test_the_demo_answers_in_words_sound_and_picture():
    answer = ROOT / "output" / "answer.wav"
    answer.parent.mkdir(exist_ok=True)
    for name in ("answer.wav", "answer.png"):
        (ROOT / "output" / name).write_bytes(b"of an earlier question")
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "demo"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(maxsplit=1) for line in lines[:4]] == [
        ["question", "what is four plus five"],
        ["answer", "nine"],
        ["speech", "output/answer.wav"],
        ["picture", "output/answer.png"],
    ]
    stages = ["input", "encoders", "prefill", "decode", "speech", "total"]
    assert [part.split()[-2] for part in lines[4].split(",")] == stages
    assert "real-time factor" in lines[5] and len(lines) == 6
    assert done.stderr == ""
    assert answer.read_bytes().startswith(b"RIFF")
    assert answer.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_question_that_is_not_there_is_named(tmp_path: Path):
    missing = tmp_path / "none.wav"
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "demo", missing], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert f"{missing}: no such file" in done.stderr
