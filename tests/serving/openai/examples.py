"""Examples of the documentation, run against the server of the tests."""

from __future__ import annotations

import contextlib
import io
import subprocess
from pathlib import Path

from tests.paths import ROOT
from tests.serving.helpers import Server

PAGE = ROOT / "docs" / "openai.md"
WRITTEN_URL = "http://127.0.0.1:8000"


def prepared(text: str, front: Server, folder: Path) -> str:
    """An example that asks ``front``; ``folder`` becomes what a checkout is to it."""
    (folder / "scripts").symlink_to(ROOT / "scripts")
    for scheme in ("http", "ws"):
        text = text.replace(f"{scheme}{WRITTEN_URL[4:]}", f"{scheme}{front.url[4:]}")
    return text


def printed(text: str, front: Server, folder: Path) -> str:
    """What an example in Python prints; it runs here, where its packages are imported already."""
    code = compile(prepared(text, front, folder), "example", "exec")
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as output:
        exec(code, {"__name__": "__main__"})
    return output.getvalue()


def printed_by(command: list[str], text: str, front: Server, folder: Path) -> str:
    """What ``command`` prints when it reads an example."""
    done = subprocess.run(
        command,
        input=prepared(text, front, folder),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
