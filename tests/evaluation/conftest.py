"""The miniature, loaded once, and manifests for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kimia_infer.api.kimia import KimiAudio
from tests.paths import MINI
from tests.training.runs import write_sound

Write = Callable[..., Path]


@pytest.fixture(scope="session")
def model() -> KimiAudio:
    return KimiAudio(str(MINI), load_detokenizer=False, device="cpu", head_rows="track")


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    return write_sound(tmp_path / "sound.wav", 0.4, 0)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a JSONL file of the rows that it is given."""

    def write_rows(*rows: object, name: str = "set") -> Path:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        return path

    return write_rows
