"""`kimi-audio clone` and `kimi-audio edit`, with a small checkpoint of the published layout."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kimia_infer.audio.files import load_audio, wav_bytes
from tests.command_line import run_here
from tests.models.step_audio_editx.recorded import RECORDED
from tests.models.step_audio_editx.stand_in import short_answers
from tests.paths import MINI
from tests.serving.questions import QUESTION

VOICE = RECORDED / "w16k.wav"
WORDS = "I never thought"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with short_answers(tmp_path_factory.mktemp("editx")) as root:
        yield root


@pytest.fixture(autouse=True)
def environment(weights: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The weights are those of the environment, and there is no Kimi-Audio."""
    monkeypatch.setenv("KIMI_AUDIO_EDITX", str(weights))
    monkeypatch.delenv("KIMI_AUDIO_WEIGHTS", raising=False)
    monkeypatch.chdir(tmp_path)


def test_a_text_is_said_in_the_voice_of_a_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("ok\n"))
    common = ("--transcript", WORDS, "--seed", 3, "--device", "cpu")
    assert run_here("clone", VOICE, "ok", *common, "--output", "new/a.wav") == 0
    assert run_here("clone", VOICE, "-", *common) == 0
    assert Path("new/a.wav").read_bytes() == Path("output/clone.wav").read_bytes()
    assert load_audio("new/a.wav").size > 4_000


def test_a_recording_is_edited_without_its_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("edit", VOICE, "--denoise", "--device", "cpu", "--output", "a.ogg") == 0
    assert Path("a.ogg").read_bytes()[:4] == b"OggS"
    assert capsys.readouterr().out.startswith("a.ogg: ")


def test_kimi_audio_writes_down_what_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--kimi-weights", MINI, "--device", "cpu", "--output", "a.wav")
    assert run_here("edit", QUESTION, "--emotion", "happy", *given) == 0
    assert "transcript: what is four plus five" in capsys.readouterr().err


def sound(seconds: float, rate: int = 16_000, level: float = 0.3) -> bytes:
    return wav_bytes(level * np.sin(np.arange(round(seconds * rate)) * 0.1), rate)


SAID = ("--transcript", WORDS)


@pytest.mark.parametrize(
    ("arguments", "content", "status", "said"),
    [
        (("clone", "a.wav", " ", *SAID), sound(1), 2, "TEXT: expected what to say"),
        (("clone", "none.wav", "Hi.", *SAID), sound(1), 2, "no such file: 'none.wav'"),
        (("clone", "a.wav", "Hi."), sound(1), 2, "--transcript: give what is said"),
        (("clone", "a.wav", "Hi.", *SAID, "--output", "a.txt"), sound(1), 2, "--output: expected"),
        (("edit", "a.wav", "--emotion", "hapy", *SAID), sound(1), 2, "did you mean 'happy'?"),
        (("edit", "a.wav", "--paralinguistic", "", *SAID), sound(1), 2, "--paralinguistic: exp"),
        (("edit", "a.wav", "--vad", *SAID), sound(1), 2, "--transcript has no effect with --vad"),
        (("clone", "a.wav", "Hi.", *SAID), b"no audio", 1, "a.wav: not readable as sound"),
        (("clone", "a.wav", "Hi.", *SAID), sound(30.2), 1, "a.wav: longer than the permitted 30 s"),
        (("clone", "a.wav", "Hi.", *SAID), sound(0.4), 1, "a.wav: 0.40 s long; send 0.5 to 30 s"),
        (("clone", "a.wav", "Hi.", *SAID), sound(1, level=0), 1, "a.wav: the recording is silent"),
        (("clone", "a.wav", "Hi.", *SAID), sound(1, 8_000), 1, "a.wav: recorded at 8000 Hz"),
        (("clone", "a.wav", "Hi.", "--transcript", "a" * 90), sound(1), 1, "--transcript: 90 ch"),
        (("clone", "a.wav", "b" * 5000, *SAID), sound(1), 1, "TEXT: about "),
        (("edit", "a.wav", "--denoise", "--seed", -1), sound(1), 2, "--seed: expected 0"),
        (("edit", "a.wav", "--denoise", "--weights", "x"), sound(1), 1, "weights 'x': no such dir"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    arguments: tuple[object, ...],
    content: bytes,
    status: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("a.wav").write_bytes(content)
    assert run_here(*arguments, "--device", "cpu") == status  # pyrefly: ignore[bad-argument-type]
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    [line] = [line for line in printed.splitlines() if line.startswith(f"{arguments[0]}: ")]
    assert said in line
    assert [path.name for path in Path().iterdir()] == ["a.wav"]


def test_without_weights_it_is_said_what_to_fetch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("KIMI_AUDIO_EDITX")
    monkeypatch.setenv("KIMI_AUDIO_CACHE", "empty")
    assert run_here("edit", VOICE, "--denoise") == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "scripts/download_weights --model editx" in line and "KIMI_AUDIO_EDITX" in line


def test_an_interruption_leaves_nothing_half_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kimia_infer.api.editx.EditX.answer", interrupted)
    assert run_here("edit", VOICE, "--denoise", "--device", "cpu", "--output", "new/a.wav") == 130
    assert not Path("new").exists()
