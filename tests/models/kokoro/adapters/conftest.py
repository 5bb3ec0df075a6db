"""Fixtures of the tests of adapters."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.kokoro.tiny import tiny_directory


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_directory(tmp_path_factory.mktemp("kokoro-tiny"))
