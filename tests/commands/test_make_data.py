"""The arguments of make-data."""

from __future__ import annotations

from pathlib import Path

import pytest

from kimia_infer.commands.make_data import error_rate_between, read_limits
from kimia_infer.commands.parser import UsageError
from tests.command_line import run_here


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["talk.wav"], "give --weights, --whisper or both"),
        (["talk.wav", "--whisper", "tiny", "--limit", "score"], "expected NAME=VALUE"),
        (["none.wav", "--whisper", "tiny"], "none.wav: no recordings there"),
        (["talk.wav", "none.wav", "--whisper", "tiny"], "none.wav: no recordings there"),
    ],
)
def test_what_is_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "talk.wav").touch()
    given = [str(tmp_path / arguments[0]), *arguments[1:], "--output", str(tmp_path / "out")]
    assert run_here("make-data", *given) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


def test_limits_are_read() -> None:
    limits = read_limits(["score=3", "languages=de,fr"])
    assert (limits.score, limits.languages, limits.clipped) == (3.0, ("de", "fr"), 0.001)
    with pytest.raises(UsageError, match=r"--limit: score: .*expected .*5"):
        read_limits(["score=7"])
    with pytest.raises(UsageError, match="score: expected a number, found 'good'"):
        read_limits(["score=good"])
    with pytest.raises(UsageError, match=r"scor: unknown field; did you mean score\?"):
        read_limits(["scor=3"])


def test_texts_are_compared_as_evaluation_does() -> None:
    assert error_rate_between("It's ten o'clock.", "it is 10 o'clock", "en") == 0
    assert error_rate_between("red door", "red window", "en") == 0.5
    assert error_rate_between("今天好", "今天很好", "zh") == 0.25
    assert error_rate_between("", "", None) == 0 and error_rate_between("so", "", None) == 1
