"""Which environment a script runs in, decided without installing anything."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.paths import ROOT


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """scripts/environment.py as if the repository were an empty directory."""
    spec = importlib.util.spec_from_file_location("environment", ROOT / "scripts/environment.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SERVING", tmp_path / "requirements.txt")
    monkeypatch.setattr(module, "EVERYTHING", tmp_path / "requirements-dev.txt")
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(module, "STAMP", tmp_path / ".venv" / "stamp")
    monkeypatch.delenv("KIMI_AUDIO_RESTARTED", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["script", "--option"])
    return module


@pytest.fixture
def calls(environment: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that would have been run; a restart ends the script as exec would."""
    commands: list[list[str]] = []

    def restart(python: Path) -> None:
        commands.append(["restart", str(python)])
        raise SystemExit("restarted")

    monkeypatch.setattr(environment, "_run", lambda command, *rest: commands.append(command))
    monkeypatch.setattr(environment, "_restart", restart)
    return commands


def require(environment: ModuleType, *lines: str) -> None:
    environment.SERVING.write_text("\n".join(lines))
    environment.EVERYTHING.write_text("-r requirements.txt\n")


def installed(name: str) -> str:
    return f"{name}=={importlib.metadata.version(name)}"


def test_versions_are_compared(environment: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["# comment", "", f"{installed('pytest')}  # why", "pytest==0.1", "no-such-thing==1.0"]
    require(environment, *lines)
    for path in (environment.SERVING, environment.EVERYTHING):
        missing = environment.missing_requirements(path)
        assert missing == ["pytest==0.1", "no-such-thing==1.0"]
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1+cu130")
    missing = environment.missing_requirements(environment.SERVING)
    assert missing[-1] == "no-such-thing==1.0"
    assert "pytest==0.1" not in missing


@pytest.mark.parametrize("line", ["pytest", "pytest>=9", "./wheel.whl", "-e ."])
def test_unreadable_requirement_is_refused(environment: ModuleType, line: str) -> None:
    require(environment, line)
    with pytest.raises(SystemExit, match="expected name==version"):
        environment.missing_requirements(environment.SERVING)


def test_serving_needs_no_tools(environment: ModuleType, calls: list) -> None:
    require(environment, installed("pytest"))
    environment.EVERYTHING.write_text("-r requirements.txt\nno-such-thing==1.0\n")
    environment.ensure(tools=False)
    assert calls == []
    environment.VENV.mkdir()
    with pytest.raises(SystemExit, match="restarted"):
        environment.ensure()


def test_complete_interpreter_is_left_alone(environment: ModuleType, calls: list) -> None:
    require(environment, installed("pytest"))
    environment.ensure()
    assert calls == []
    assert str(ROOT) in sys.path


def test_missing_requirements_are_installed_once(environment: ModuleType, calls: list) -> None:
    require(environment, "no-such-thing==1.0")
    python = environment.VENV / "bin" / "python"

    def attempt() -> None:
        with pytest.raises(SystemExit, match="restarted"):
            environment.ensure()

    environment.VENV.mkdir()
    attempt()
    create, install, restart = calls
    assert create[1:3] == ["-m", "venv"] and create[-1] == str(environment.VENV)
    assert install == [str(python), "-m", "pip", "install", "-r", str(environment.EVERYTHING)]
    assert restart == ["restart", str(python)]

    calls.clear()
    os.environ.pop("KIMI_AUDIO_RESTARTED")
    attempt()
    assert calls == [restart], "nothing is installed twice"

    calls.clear()
    os.environ.pop("KIMI_AUDIO_RESTARTED")
    require(environment, "no-such-thing==2.0")
    attempt()
    assert install in calls, "changed requirements are installed"


def test_directory_that_cannot_be_written_is_named(
    environment: ModuleType, calls: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    require(environment, "no-such-thing==1.0")
    monkeypatch.setattr(environment, "VENV", Path("/proc/self"))  # where nobody makes a file
    with pytest.raises(SystemExit, match=r"script: /proc/self: cannot be written \(.*make room"):
        environment.ensure()
    assert calls == []


def test_restarting_does_not_loop(environment: ModuleType, calls: list, monkeypatch) -> None:
    require(environment, "no-such-thing==1.0")
    monkeypatch.setenv("KIMI_AUDIO_RESTARTED", "1")
    with pytest.raises(SystemExit, match=r"still lacks no-such-thing==1\.0"):
        environment.ensure()
    assert calls == []


@pytest.mark.parametrize("root", [True, False], ids=["root", "user"])
def test_missing_program(
    environment: ModuleType, calls: list, monkeypatch: pytest.MonkeyPatch, root: bool
) -> None:
    require(environment, installed("pytest"))
    monkeypatch.setattr(
        environment.shutil, "which", lambda name: None if name == "ffmpeg" else f"/usr/bin/{name}"
    )
    monkeypatch.setattr(environment.os, "geteuid", lambda: 0 if root else 1000)
    if root:
        environment.ensure("espeak-ng", "ffmpeg")
        assert [command[:2] for command in calls] == [["apt-get", "update"], ["apt-get", "install"]]
        assert calls[1][-1] == "ffmpeg"
    else:
        with pytest.raises(SystemExit, match="sudo apt-get install ffmpeg"):
            environment.ensure("espeak-ng", "ffmpeg")


def test_old_python_looks_for_a_newer_one(
    environment: ModuleType, calls: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "OLDEST", (3, 99))
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match=r"Python 3\.99 or newer is needed"):
        environment.require_python()
    monkeypatch.setattr(environment, "OLDEST", (3, sys.version_info[1]))
    monkeypatch.setattr(environment.shutil, "which", lambda name: sys.executable)
    assert environment._newer_python() == Path(sys.executable)


def test_failing_command_ends_the_script(environment: ModuleType) -> None:
    with pytest.raises(SystemExit, match="failed: false"):
        environment._run(["false"])


def test_output_of_commands_goes_to_stderr(tmp_path: Path) -> None:
    code = "import environment; environment._run(['echo', 'noise']); print('result')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "scripts", capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("result\n", "noise\n")
