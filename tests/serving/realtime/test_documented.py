"""The example of docs/realtime.md."""

from __future__ import annotations

import re
from pathlib import Path

from tests.documentation import blocks
from tests.paths import ROOT
from tests.serving.helpers import Server
from tests.serving.openai.examples import printed


def test_the_example_prints_the_answer(front: Server, tmp_path: Path) -> None:
    [block] = blocks(ROOT / "docs" / "realtime.md", "python")
    found = printed(block.text, front, tmp_path)
    assert re.sub(r"[01]\.\d s", "0.6 s", found) == block.output
