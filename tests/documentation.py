"""Blocks of code in the documentation."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

BLOCK = re.compile(
    r"^```(\w+)(?: (\w+))?\n(.*?)^```$(?:\n\n((?:    [^\n]*\n)+))?", re.MULTILINE | re.DOTALL
)
NOT_RUN = {"download", "gpu", "docker", "install", "long", "example"}


class Block(NamedTuple):
    """``reason`` not to run it ("" if there is none), its text, and the indented output below."""

    reason: str
    text: str
    output: str


def blocks(page: Path, language: str) -> Iterator[Block]:
    """The blocks in ``language``."""
    for found, reason, text, output in BLOCK.findall(page.read_text(encoding="utf-8")):
        if found == language:
            assert reason in {"", *NOT_RUN}, f"{page}: unknown kind of block {reason!r}"
            yield Block(reason, text, textwrap.dedent(output))
