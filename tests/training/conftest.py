"""The untrained miniature, from which trainings begin."""

from __future__ import annotations

from pathlib import Path

import pytest

from kimia_infer.training.miniature.untrained import write_miniature


@pytest.fixture(scope="session")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its directory."""
    directory = tmp_path_factory.mktemp("untrained")
    write_miniature(directory)
    return directory
