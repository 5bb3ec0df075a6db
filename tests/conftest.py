"""Shared fixtures: where the recorded references are, and quiet, repeatable arithmetic."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

GOLDEN = Path(os.environ.get("KIMI_AUDIO_GOLDEN", Path(__file__).parent / "golden"))


@pytest.fixture(scope="session")
def golden() -> Path:
    """Directory of the recorded references; KIMI_AUDIO_GOLDEN names another set."""
    return GOLDEN


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)
