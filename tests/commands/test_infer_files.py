"""Several recordings on the command line: each is answered on its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kimia_infer.commands.main import run_command
from tests.paths import MINI, ROOT


@pytest.fixture
def recordings(tmp_path: Path) -> list[str]:
    """Two questions, and a file that is no sound between them."""
    paths = [tmp_path / f"{name}.wav" for name in ("first", "broken", "second")]
    for path in paths:
        shutil.copy(ROOT / "scripts" / "question.wav", path)
    paths[1].write_bytes(b"no sound")
    return [str(path) for path in paths]


def infer(recordings: list[str], output: Path, *more: str) -> int:
    given = ["--weights", str(MINI), "--output", str(output), "--audio", *recordings, *more]
    return run_command("infer", given, "kimi-audio infer")


def test_each_is_answered_and_what_is_refused_is_named(
    recordings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "answers"
    assert infer(recordings, output, "--seed", "1") == 1
    first, broken, second = recordings
    printed = capsys.readouterr()
    assert printed.out == f"{first}: nine\n{second}: nine\n"
    assert f"infer: {broken}: audio: " in printed.err
    assert "1 of 3 files were refused" in printed.err
    assert sorted(path.name for path in output.iterdir()) == ["first.wav", "second.wav"]
    assert (output / "first.wav").read_bytes() == (output / "second.wav").read_bytes()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--metrics"], "--metrics goes with a single --audio"),
        (["--output", "one.wav"], "--output: with several --audio it is a directory"),
    ],
)
def test_what_goes_with_one_recording_is_refused(
    recordings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], more, message: str
) -> None:
    with pytest.raises(SystemExit):
        infer(recordings, tmp_path / "answers", *more)
    assert message in capsys.readouterr().err


def test_answers_of_one_name_are_refused(
    recordings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = tmp_path / "elsewhere"
    same.mkdir()
    shutil.copy(recordings[0], same / "first.mp3")
    with pytest.raises(SystemExit):
        infer([recordings[0], str(same / "first.mp3")], tmp_path / "answers")
    assert "the answers to 2 files would be called first.wav" in capsys.readouterr().err
