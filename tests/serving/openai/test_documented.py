"""The examples of docs/openai.md print what stands below them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.documentation import Block, blocks
from tests.serving.helpers import Server
from tests.serving.openai.examples import PAGE, WRITTEN_URL, printed

INTERPRETERS = {"python": [sys.executable, "-"], "sh": ["bash", "-euo", "pipefail"]}
EXAMPLES = [
    (language, block)
    for language in INTERPRETERS
    for block in blocks(PAGE, language)
    if not block.text.startswith("scripts/serve")
]


@pytest.mark.parametrize(("language", "block"), EXAMPLES)
def test_examples_print_what_stands_below_them(
    front: Server, tmp_path: Path, language: str, block: Block
) -> None:
    assert WRITTEN_URL in block.text and block.output
    assert printed(INTERPRETERS[language], block.text, front, tmp_path).strip() == (
        block.output.strip()
    )
