"""The real server on the miniature, started once for all tests of a process, and its clients."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.paths import MINI, ROOT
from tests.serving.helpers import Server, serve

QUESTION = ROOT / "scripts" / "question.wav"
"""A question that the miniature understands: "what is four plus five", to which it says "nine"."""


@pytest.fixture(scope="session")
def front(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """``scripts/serve --openai`` with the trained miniature."""
    directory = tmp_path_factory.mktemp("front")
    with serve(golden, directory, "--openai", KIMI_AUDIO_WEIGHTS=str(MINI)) as server:
        yield server


@pytest.fixture(scope="session")
def client(front: Server) -> openai.OpenAI:
    """OpenAI's own client, which tries nothing twice."""
    return openai.OpenAI(base_url=f"{front.url}/v1", api_key="unused", max_retries=0)
