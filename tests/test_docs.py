"""The documentation: links lead somewhere, commands have the options they use, and they run.

Blocks of shell commands are fenced as ``sh``. A word after that says why a block is not run here:
``download``, ``gpu``, ``docker``, ``install`` and ``long`` are what it takes, and ``example`` marks
commands about files that only the reader has. What is written in ``python`` and ``js`` for clients
of the OpenAI server is run by ``tests/serving/openai/test_documented.py``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.documentation import blocks
from tests.paths import ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / "weights" / name for name in ("README.md", "mini/README.md")),
]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]

PATHS = re.compile(r"`((?:tests|scripts|docs|kimia_infer|weights)/[\w./-]+|[\w/]+\.py)`")
MADE_BY_COMMANDS = ("weights/slim", "weights/Kimi-Audio-7B-Instruct")


def slug(heading: str) -> str:
    """The anchor that a heading gets."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_and_paths_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page}: {target}"
    if page.name == "CHANGELOG.md":  # names files that are gone
        return
    for name in PATHS.findall(text):
        places = (ROOT / name, ROOT / "kimia_infer" / name)
        made = name.startswith(MADE_BY_COMMANDS)
        assert made or any(place.exists() for place in places), f"{page}: {name}"


@cache
def help_of(program: str) -> str:
    """What ``program --help`` prints, and for commands with components also their help."""
    name, *inner = program.split()
    command = [sys.executable, ROOT / name, *inner, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, f"{program} --help: {done.stderr}"
    return done.stdout


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_have_the_options_they_use(page: Path) -> None:
    for _, text, _ in blocks(page, "sh"):
        for line in text.replace("\\\n", " ").splitlines():
            command = re.search(r"(?<!\S)scripts/(\w+)(?=\s|$)(.*)", line.partition("  #")[0])
            if command is None or not (ROOT / "scripts" / command[1]).is_file():
                continue
            for option in re.findall(r"(?<!\S)(--[\w-]+)", command[2].partition("|")[0]):
                known = re.search(rf"{option}\b", help_of(f"scripts/{command[1]}"))
                assert known, f"{page}: scripts/{command[1]} has no {option}"


def checkout(folder: Path) -> Path:
    """A copy of what git tracks and of what is new, with the environment of this checkout."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    if (ROOT / ".venv").exists():
        (folder / ".venv").symlink_to((ROOT / ".venv").resolve())
    return folder


def start_server(script: str, folder: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    server = subprocess.Popen(
        ["bash", "-c", f"exec {script.partition('  #')[0].strip()}"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    for line in server.stdout:
        if line.startswith("Ready"):
            return server
    pytest.fail(f"{script}: ended with {server.wait()} before it was ready")


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_run_as_written(page: Path, tmp_path: Path, long: bool) -> None:
    """In order, in a copy of the checkout; a server runs from its block to the end of the page."""
    scripts = [text for reason, text, _ in blocks(page, "sh") if not reason]
    if not scripts:
        pytest.skip("no commands to run")
    if not long:
        pytest.skip("runs with --long")
    folder = checkout(tmp_path)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    servers: list[subprocess.Popen[str]] = []
    try:
        for script in scripts:
            if script.startswith("scripts/serve"):
                servers.append(start_server(script, folder, environment))
                continue
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", script],
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=900,
            )
            assert done.returncode == 0, f"{script}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    finally:
        for server in servers:
            server.terminate()  # interrupts are ignored by what shells run in the background
            server.wait(60)


def test_the_library_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = [text for _, text, _ in blocks(ROOT / "README.md", "python")]
    for name in ("weights", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert {"TextDelta", "AudioChunk", "Completion"} <= set(capsys.readouterr().out.split())
    assert (tmp_path / "answer.wav").stat().st_size > 1000
