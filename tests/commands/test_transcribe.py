"""Recordings to files of text on the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from kimia_infer.audio.encode import encode
from kimia_infer.audio.files import SAMPLE_RATE, load_audio
from kimia_infer.commands.main import run_command
from tests.paths import MINI
from tests.serving.questions import QUESTION

WORDS = "what is four plus five"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three recordings in folders, one that is broken, and a file that is none."""
    folder = tmp_path / "talks"
    (folder / "deep").mkdir(parents=True)
    shutil.copy(QUESTION, folder / "first.wav")
    wave = load_audio(QUESTION)
    twice = np.concatenate([wave, np.zeros(SAMPLE_RATE, np.float32), wave])
    (folder / "deep" / "second.MP3").write_bytes(encode(twice, "mp3", SAMPLE_RATE))
    (folder / "deep" / "third.opus").write_bytes(encode(wave, "opus", SAMPLE_RATE))
    (folder / "broken.flac").write_bytes(b"no sound")
    (folder / "notes.txt").write_text("four plus five")
    return folder


def transcribe(*arguments: str | Path) -> int:
    given = ["--weights", str(MINI), "--device", "cpu", *map(str, arguments)]
    return run_command("transcribe", given, "kimi-audio transcribe")


def files(folder: Path) -> dict[str, str]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_text() for path in paths}


def test_a_directory_is_written_down_and_the_broken_file_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "texts"
    assert transcribe(folder, "--output", output) == 1
    expected = {"deep/second.txt": f"{WORDS} {WORDS}\n"}
    expected |= dict.fromkeys(["deep/third.txt", "first.txt"], f"{WORDS}\n")
    assert files(output) == expected
    printed = capsys.readouterr()
    assert sorted(printed.out.splitlines()) == sorted(str(output / name) for name in expected)
    assert "transcribe: 3 written, 1 failed:" in printed.err
    assert f"  {folder}/broken.flac: no audio track in it" in printed.err


def test_the_same_command_continues(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "broken.flac").unlink()
    (folder / "first.srt").write_text("by hand")
    assert transcribe(folder, "--format", "srt") == 0
    assert (folder / "first.srt").read_text() == "by hand"
    assert WORDS in (folder / "deep" / "third.srt").read_text()
    printed = capsys.readouterr()
    assert "1 of 3 are complete already" in printed.err and "2 written" in printed.err
    monkeypatch.setattr("kimia_infer.api.kimia.KimiAudio", None)  # nothing is loaded for nothing
    assert transcribe(folder, "--format", "srt") == 0
    assert "3 of 3 are complete already" in capsys.readouterr().err
    monkeypatch.undo()
    assert transcribe(folder / "first.wav", "--format", "srt", "--overwrite") == 0
    assert (folder / "first.srt").read_text() == f"1\n00:00:00,100 --> 00:00:01,850\n{WORDS}\n"


def test_patterns_and_formats(folder: Path) -> None:
    assert transcribe(f"{folder}/**/*.MP3", folder / "first.wav", "--format", "json") == 0
    found = json.loads((folder / "deep" / "second.json").read_text())
    assert found["text"] == f"{WORDS} {WORDS}"
    assert " ".join(segment["text"] for segment in found["segments"]) == found["text"]
    assert found["duration"] == pytest.approx(5, abs=0.2)
    assert found["duration"] - 0.4 < found["segments"][-1]["end"] < found["duration"]
    assert json.loads((folder / "first.json").read_text())["text"] == WORDS
    assert transcribe(folder / "first.wav", "--format", "vtt", "--prompt", "Sums.") == 0
    assert (folder / "first.vtt").read_text().endswith(f"{WORDS}\n")
    assert not (folder / "deep" / "third.json").exists()


def test_a_recording_that_is_named_may_have_any_name(folder: Path) -> None:
    for name in ("talk.v2", "talk.txt"):
        shutil.copy(QUESTION, folder / name)
    assert transcribe(folder / "talk.v2", folder / "talk.txt") == 0
    assert (folder / "talk.v2.txt").read_text() == (folder / "talk.txt.txt").read_text()
    assert (folder / "talk.txt").read_bytes() == QUESTION.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/none.wav"], "no such file"),
        (["{}/n*"], "no recordings there"),
        (["{}/empty"], "no recordings there"),
        (["{}/first.wav", "{}/first.flac"], "would both be written to first.txt"),
        (["{}/first.wav", "--output", "{}/notes.txt"], "is no directory"),
        (["{}/first.wav", "--format", "docx"], "invalid choice: 'docx'"),
        (["{}/first.wav", "--language", "de"], "invalid choice: 'de'"),
    ],
)
def test_what_cannot_be_done_is_refused_at_once(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (folder / "empty").mkdir()
    shutil.copy(QUESTION, folder / "first.flac")
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        transcribe(*(argument.format(folder) for argument in arguments))
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before


def test_a_failure_leaves_no_half_file(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "texts"
    output.mkdir()
    (output / "first.txt").mkdir()  # where the text should stand
    assert transcribe(folder / "first.wav", "--output", output, "--overwrite") == 1
    assert "first.txt" in capsys.readouterr().err
    assert [path.name for path in output.rglob("*")] == ["first.txt"]
