"""Kokoro from the hub: which files, and content that is not the pinned one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kimia_infer.models.kokoro.layout import KOKORO, KOKORO_LAYOUT
from kimia_infer.utils.errors import WeightsError
from kimia_infer.weights.download import download
from tests.weights.fake_hub import Hub, pickle_archive

FILES = {
    "README.md": b"not needed",
    "config.json": b"{}",
    "kokoro-v1_0.pth": pickle_archive("model"),
    "samples/HEARME.wav": b"not needed",
    "voices/af_heart.pt": pickle_archive("heart"),
    "voices/bf_emma.pt": pickle_archive("emma"),
}


@pytest.fixture
def published(hub: Hub) -> Hub:
    hub.files[KOKORO.name] = FILES
    hub.revisions[KOKORO.name] = KOKORO.revision
    return hub


def test_the_needed_files(published: Hub, tmp_path: Path) -> None:
    layout = replace(KOKORO_LAYOUT, checksums={})
    download(tmp_path / "to", layout)
    found = {p.relative_to(tmp_path / "to").as_posix() for p in (tmp_path / "to").rglob("*.*")}
    assert found - {".download.lock", "download.json"} == {
        name for name, content in FILES.items() if content != b"not needed"
    }
    assert not layout.incomplete_files(tmp_path / "to")


def test_another_content_than_the_pinned_one(published: Hub, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"the hub has kokoro-v1_0\.pth with SHA-256 .*expected"):
        download(tmp_path / "to", KOKORO_LAYOUT)
    assert not (tmp_path / "to" / "kokoro-v1_0.pth").exists()
