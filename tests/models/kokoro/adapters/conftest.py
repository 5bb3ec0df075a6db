"""Fixtures of the tests of adapters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.models.kokoro.tiny import narrow_kokoro


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with narrow_kokoro(tmp_path_factory.mktemp("kokoro-tiny")) as directory:
        yield directory
