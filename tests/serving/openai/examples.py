"""Examples of the documentation, run against the server of the tests."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.paths import ROOT
from tests.serving.helpers import Server

PAGE = ROOT / "docs" / "openai.md"
WRITTEN_URL = "http://127.0.0.1:8000"


def printed(command: list[str], text: str, front: Server, folder: Path) -> str:
    """What an example prints that stands in ``folder``, beside the scripts of a checkout."""
    (folder / "scripts").symlink_to(ROOT / "scripts")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for scheme in ("http", "ws"):
        text = text.replace(f"{scheme}{WRITTEN_URL[4:]}", f"{scheme}{front.url[4:]}")
    done = subprocess.run(
        command,
        input=text,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
