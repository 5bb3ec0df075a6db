"""A server that allows little."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.paths import MINI
from tests.serving.helpers import Server, serve


@pytest.fixture(scope="session")
def limited(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with keys, of which each may ask twice in a minute, and other names."""
    settings = {
        "KIMI_AUDIO_WEIGHTS": str(MINI),
        "KIMI_AUDIO_API_KEYS": "first, second, retrying",
        "KIMI_AUDIO_MODEL_NAMES": "hearing,whisper-1",
        "KIMI_AUDIO_REQUESTS_PER_MINUTE": "2",
        "KIMI_AUDIO_CORS_ORIGINS": "https://example.org",
    }
    with serve(golden, tmp_path_factory.mktemp("limited"), "--openai", **settings) as server:
        yield server
