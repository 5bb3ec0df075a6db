"""How many files a newcomer reads to follow one recording to its answer."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.paths import ROOT

MOST_FILES = 25


def test_a_recording_meets_few_files() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "walk")],
        capture_output=True,
        text=True,
        check=True,
    )
    *files, last = done.stdout.splitlines()
    count, text = re.fullmatch(r"(\d+) files between .* answer, '(.*)'", last).groups()
    assert text == "nine"
    assert len(files) == int(count) <= MOST_FILES
    assert files[0].endswith("predict.py")
