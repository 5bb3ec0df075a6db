"""The wheel in an empty environment: installed with pip, it answers outside the checkout."""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.paths import MINI, ROOT

PREDICTORS = ("predict.py", "predict_editx.py")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the files that git knows, with what is installed here."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in (
        "kimia_infer",
        "predict.py",
        "predict_editx.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
    ):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    subprocess.run([*command, str(source)], check=True, capture_output=True)
    [path] = folder.iterdir()
    return path


def test_the_wheel_has_the_package_and_nothing_around_it(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"kimia_infer"}
    package = (path for path in (ROOT / "kimia_infer").rglob("*") if path.is_file())
    files = {str(path.relative_to(ROOT)) for path in package if "__pycache__" not in path.parts}
    assert {"kimia_infer/models/kokoro/aligner.safetensors"} < files
    assert files | {f"kimia_infer/{name}" for name in PREDICTORS} == {
        name for name in names if name.startswith("kimia_infer/")
    }


def test_an_installed_wheel_answers(wheel: Path, tmp_path: Path, long: bool) -> None:
    """In minutes: PyTorch and everything else is installed anew, from the pinned requirements."""
    if not long:
        pytest.skip("installs gigabytes; runs with --long")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("KIMI_", "PYTHON"))}

    def run(*command: object) -> str:
        done = subprocess.run(
            list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(sys.executable, "-m", "venv", "empty")
    binaries = tmp_path / "empty" / "bin"
    pins = ["--constraint", ROOT / "requirements.txt"]
    run(binaries / "python", "-m", "pip", "install", "--quiet", *pins, f"{wheel}[serve]")
    shutil.copytree(MINI, tmp_path / "mini")
    shutil.copy(ROOT / "scripts" / "question.wav", tmp_path)
    question = ["--weights", "mini", "--audio", "question.wav", "--seed", "0"]
    assert run(binaries / "kimi-audio", "infer", *question) == "nine\n"
    assert (tmp_path / "answer.wav").read_bytes().startswith(b"RIFF")
    with served(binaries, tmp_path, environment) as url:
        assert_answers_openais_client(url, tmp_path / "question.wav")
        assert "<!doctype html>" in httpx.get(url).text.lower()
    with served(binaries, tmp_path, environment, "--cog") as url:
        asked = ("--url", url, "--audio", "question.wav")
        assert run(binaries / "kimi-audio", "infer", *asked) == "nine\n"


def assert_answers_openais_client(url: str, question: Path) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused")
    data = base64.b64encode(question.read_bytes()).decode()
    part: Any = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    answer = client.chat.completions.create(
        model="kimi-audio",
        messages=[{"role": "user", "content": [part]}],
        modalities=["text", "audio"],
        audio={"voice": "alloy", "format": "mp3"},
    )
    audio = answer.choices[0].message.audio
    assert audio is not None and audio.transcript == "nine" and audio.data
    with question.open("rb") as file:
        transcript = client.audio.transcriptions.create(model="kimi-audio", file=file)
    assert transcript.text == "what is four plus five"


@contextlib.contextmanager
def served(
    binaries: Path, folder: Path, environment: dict[str, str], *options: str
) -> Iterator[str]:
    """The URL of ``kimi-audio serve``."""
    serve = [binaries / "kimi-audio", "serve", "--weights", "mini", "--port", "0", *options]
    server = subprocess.Popen(
        serve, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        yield server.stdout.readline().removeprefix("Ready: ").strip()
    finally:
        server.terminate()
        server.communicate()
