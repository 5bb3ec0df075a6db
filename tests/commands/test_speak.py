"""`kimi-audio speak`: texts from three places, in the format of the output's name."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from kimia_infer.audio.files import load_audio
from kimia_infer.commands.main import run_command
from kimia_infer.models.kokoro.adapters.config import AdapterConfig
from kimia_infer.models.kokoro.adapters.seams import adapter_parameters, attach, fingerprint
from kimia_infer.models.kokoro.adapters.store import save_adapter
from kimia_infer.models.kokoro.checkpoint import load_network
from tests.models.kokoro.recorded import write_whole
from tests.models.kokoro.tiny import tiny_directory

TEXT = "Hello there."


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("kokoro")
    write_whole(directory)
    return directory


def speak(directory: Path, *arguments: str | Path) -> int:
    weights = ["--weights", str(directory), "--device", "cpu", "--seed", "1"]
    return run_command("speak", [*map(str, arguments), *weights], "kimi-audio speak")


def test_a_text_a_file_and_standard_input_are_spoken_alike(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "story.txt").write_text(TEXT)
    monkeypatch.setattr("sys.stdin", io.StringIO(TEXT))
    given = {"text": [TEXT], "file": ["--file", tmp_path / "story.txt"], "input": ["-"]}
    for name, text in given.items():
        assert speak(directory, *text, "--output", tmp_path / f"{name}.wav") == 0
    contents = {(tmp_path / f"{name}.wav").read_bytes() for name in given}
    assert len(contents) == 1
    assert load_audio(tmp_path / "text.wav").size > 8_000


def test_the_suffix_says_the_format(directory: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "speech.ogg"
    assert speak(directory, TEXT, "--output", output) == 0
    assert output.read_bytes()[:4] == b"OggS" and load_audio(output).size > 8_000


def test_voices_are_listed(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert speak(directory, "--voices") == 0
    assert "af_heart" in capsys.readouterr().out.split()


def test_an_adapter_is_named_or_is_a_directory(tmp_path: Path) -> None:
    model = tiny_directory(tmp_path)
    predictor = load_network(model, torch.device("cpu")).predictor
    config, base = AdapterConfig(seams=("lstm",)), fingerprint(predictor)
    attach(predictor, config)
    for parameter in adapter_parameters(predictor).values():
        torch.nn.init.constant_(parameter, 0.5)
    save_adapter(model / "adapters" / "slow", predictor, config, base, str(model))
    waves = {}
    for name in ("slow", str(model / "adapters" / "slow"), None):
        adapter = [] if name is None else ["--adapter", name]
        assert speak(model, TEXT, *adapter, "--output", tmp_path / "hi.wav") == 0
        waves[name] = (tmp_path / "hi.wav").read_bytes()
    assert len(set(waves.values())) == 2 and waves[None] != waves["slow"]


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ([], 2, "expected a text, or --file"),
        (["Hi.", "--output", "speech.m4a"], 2, "--output: expected .wav, .mp3"),
        (["--file", "missing.txt"], 2, "--file: "),
        (["Hi.", "--voice", "xx_nobody"], 1, "xx_nobody"),
        (["Hi.", "--adapter", "mine"], 1, "adapter: 'mine' is not known"),
        (["Hi.", "--speed", "9"], 1, "speed: expected 0.25 .. 4"),
        (["🙂"], 1, "text: "),
    ],
)
def test_what_cannot_be_spoken_is_one_line(
    directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        assert speak(directory, *arguments) == status
    except SystemExit as ended:
        assert ended.code == status
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert not list(tmp_path.iterdir())
