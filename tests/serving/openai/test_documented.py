"""The examples of docs/openai.md print what stands below them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.documentation import Block, blocks
from tests.serving.helpers import Server
from tests.serving.openai.examples import PAGE, WRITTEN_URL, printed, printed_by

SHELL = ["bash", "-euo", "pipefail"]


@pytest.mark.parametrize("block", list(blocks(PAGE, "python")))
def test_examples_print_what_stands_below_them(front: Server, tmp_path: Path, block: Block) -> None:
    assert WRITTEN_URL in block.text and block.output
    assert printed(block.text, front, tmp_path).strip() == block.output.strip()


@pytest.mark.parametrize(
    "block", [b for b in blocks(PAGE, "sh") if not b.text.startswith("scripts/serve")]
)
def test_commands_print_what_stands_below_them(front: Server, tmp_path: Path, block: Block) -> None:
    assert WRITTEN_URL in block.text and block.output
    assert printed_by(SHELL, block.text, front, tmp_path).strip() == block.output.strip()
