"""The Python environment of the scripts: found, or made on first use.

Scripts that are also commands of ``kimi-audio`` call ``run_command()``. Others call ``ensure()``
before they import anything that has to be installed, or ``require_python()`` if they need the
standard library alone.

Nothing happens where the running interpreter has the pinned requirements; otherwise ``.venv`` is
created in the repository and the script starts again inside it. Serving needs requirements.txt
alone (``tools=False``), everything else requirements-dev.txt, which ``.venv`` gets.

Uses the standard library alone, in syntax that old Pythons can read, so that those get a message
instead of a traceback. Everything is printed to stderr.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
SERVING = ROOT / "requirements.txt"
EVERYTHING = ROOT / "requirements-dev.txt"
VENV = ROOT / ".venv"
STAMP = VENV / "requirements.sha256"
OLDEST = (3, 11)

_RESTARTED = "KIMI_AUDIO_RESTARTED"


def run_command(name: str, tools: bool = True) -> None:
    """Run a command of ``kimi-audio`` as the script that was called, and end the process.

    The environment is set up (see :func:`ensure`) once the arguments are known to be good.
    """
    require_python()
    from kimia_infer.commands.main import run_command as run

    program = f"scripts/{Path(sys.argv[0]).name}"
    sys.exit(run(name, sys.argv[1:], program, lambda: ensure(tools=tools)))


def require_python() -> None:
    """Return in a Python that is new enough, from which the repository can be imported."""
    if sys.version_info < OLDEST:
        _restart(_newer_python())
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))


def ensure(*programs: str, tools: bool = True) -> None:
    """Return in a Python that has the requirements and the ``programs``.

    Programs have the names of their Debian packages. May install packages and replace the running
    process. Ends with a message that names the remedy if something cannot be installed.
    """
    require_python()
    requirements = EVERYTHING if tools else SERVING
    restarted = os.environ.pop(_RESTARTED, None) is not None
    inside = Path(sys.prefix).resolve() == VENV.resolve()
    if not (_installed() if inside else not missing_requirements(requirements)):
        if restarted:
            missing = ", ".join(missing_requirements(requirements))
            _fail(f"{VENV} still lacks {missing or 'something'}; delete it and try again")
        if not _installed():
            _install()
        os.environ[_RESTARTED] = "1"
        _restart(VENV / "bin" / "python")
    for program in programs:
        if shutil.which(program) is None:
            _apt_install(program)


def missing_requirements(path: Path) -> list[str]:
    """The lines ``name==version`` of ``path`` that the running interpreter does not meet.

    A line ``-r FILE`` stands for the lines of another file beside it.
    """
    missing = []
    for line in path.read_text().splitlines():
        line = line.partition("#")[0].strip()
        if not line:
            continue
        if line.startswith("-r "):
            missing += missing_requirements(path.parent / line[3:].strip())
            continue
        match = re.fullmatch(r"([\w.-]+)==([\w.]+)", line)
        if match is None:
            _fail(f"{path}: expected name==version, found {line!r}")
        try:
            # A build for one CUDA version calls itself 2.14.1+cu130.
            found = importlib.metadata.version(match[1]).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            found = None
        if found != match[2]:
            missing.append(line)
    return missing


def _installed() -> bool:
    """Whether ``.venv`` was completely installed from the present requirements."""
    return STAMP.is_file() and STAMP.read_text() == _fingerprint()


def _fingerprint() -> str:
    return hashlib.sha256(SERVING.read_bytes() + EVERYTHING.read_bytes()).hexdigest()


def _install() -> None:
    if importlib.util.find_spec("ensurepip") is None:
        _apt_install(f"python{sys.version_info[0]}.{sys.version_info[1]}-venv")
    with EVERYTHING.open() as lock:
        # Two scripts started at once must not install into the same directory.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _installed():
            return
        python = VENV / "bin" / "python"
        _check_room()
        _say(f"installing {EVERYTHING.name} into {VENV} (once; 6 GB, some minutes)")
        if not _runs(python, "import pip"):
            _run([sys.executable, "-m", "venv", "--clear", str(VENV)])
        _run([str(python), "-m", "pip", "install", "-r", str(EVERYTHING)])
        STAMP.write_text(_fingerprint())


def _check_room() -> None:
    """End with the directory's name if the environment cannot be installed in it."""
    folder = VENV if VENV.is_dir() else ROOT
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
            file.flush()
    except OSError as error:
        _fail(
            f"{folder}: cannot be written ({error.strerror}), and the packages belong into "
            f"{VENV}: make room, make it writable for this user, or start this script with a "
            f"Python that has the packages of {SERVING.name} or {EVERYTHING.name}"
        )


def _apt_install(package: str) -> None:
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        _fail(
            f"{package} is missing; install it, on Debian and Ubuntu with:\n"
            f"  sudo apt-get update && sudo apt-get install {package}"
        )
    _say(f"installing the system package {package}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    _run(["apt-get", "update", "-qq"], environment)
    _run(["apt-get", "install", "-qq", "--no-install-recommends", package], environment)


def _newer_python() -> Path:
    for minor in range(OLDEST[1], 20):
        found = shutil.which(f"python3.{minor}")
        if found is not None and _runs(Path(found), "import venv"):
            return Path(found)
    version = ".".join(map(str, sys.version_info[:3]))
    _fail(f"Python {OLDEST[0]}.{OLDEST[1]} or newer is needed, this is {version} and PATH has none")


def _runs(python: Path, code: str) -> bool:
    """Whether ``python`` exists and runs ``code``; shims of version managers may not."""
    if not python.exists():
        return False
    return subprocess.run([str(python), "-c", code], capture_output=True).returncode == 0


def _run(command: list[str], environment: dict[str, str] | None = None) -> None:
    if subprocess.run(command, stdout=sys.stderr, env=environment).returncode != 0:
        _fail(f"failed: {' '.join(command)}")


def _restart(python: Path) -> None:
    sys.stdout.flush()
    os.execv(str(python), [str(python), *sys.argv])


def _say(message: str) -> None:
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)


def _fail(message: str) -> NoReturn:
    raise SystemExit(f"{Path(sys.argv[0]).name}: {message}")
