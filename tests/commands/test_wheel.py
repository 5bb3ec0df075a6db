"""The wheel in an empty environment: installed with pip, it answers outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.paths import MINI, ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the files that git knows, with what is installed here."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("kimia_infer", "predict.py", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    subprocess.run([*command, str(source)], check=True, capture_output=True)
    [path] = folder.iterdir()
    return path


def test_the_wheel_has_the_package_and_nothing_around_it(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"kimia_infer"}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "kimia_infer").rglob("*.py")}
    assert modules | {"kimia_infer/predict.py"} == {name for name in names if name.endswith(".py")}
    page = {path.name for path in (ROOT / "kimia_infer" / "serving" / "page").iterdir()}
    assert page == {
        Path(name).name for name in names if name.startswith("kimia_infer/serving/page/")
    }
    assert not [name for name in names if "__pycache__" in name]


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
    assert_served(binaries, tmp_path, environment)


def assert_served(binaries: Path, folder: Path, environment: dict[str, str]) -> None:
    serve = [binaries / "kimi-audio", "serve", "--weights", "mini", "--port", "0"]
    server = subprocess.Popen(
        serve, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        url = server.stdout.readline().removeprefix("Ready: ").strip()
        infer = [binaries / "kimi-audio", "infer", "--url", url, "--audio", "question.wav"]
        done = subprocess.run(infer, cwd=folder, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, "nine\n"), done.stderr
    finally:
        server.terminate()
        server.communicate()
