"""Figures and pictures of a checkpoint; here of an untrained one, which says nothing right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.miniature import figures
from scripts.miniature.figures import FIGURES, PICTURE, write_figures
from scripts.miniature.spoken_world import WorldSize, write_world
from scripts.miniature.untrained import write_miniature


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    size = WorldSize(train=5, validation=5, held_out=20, held_out_voices=5, voice_held_out=6)
    write_world(folder, size, processes=1)
    return folder


def test_figures_are_written(world: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(figures, "TIMED", 1)
    monkeypatch.setattr(figures, "measure", lambda *_: {"sets": {}})
    monkeypatch.setattr("scripts.miniature.scoring.MOST_STEPS", 30)
    checkpoint = tmp_path / "mini"
    write_miniature(checkpoint)
    measured = write_figures(checkpoint, world, tmp_path / "out", limit=4)
    assert json.loads((tmp_path / "out" / FIGURES).read_text()) == measured
    assert (tmp_path / "out" / PICTURE).read_bytes().startswith(b"\x89PNG")
    codec, read = measured["codec"], measured["read_aloud"]
    assert codec["original"]["recall"] > 0.8 and codec["original"]["ratio"] == 1
    assert codec["original"]["sentences"] == 6
    # Nothing is learned, so what is understood is chance.
    for name in ("one-shot", "streamed"):
        assert codec[name]["ratio"] < 0.6
        assert read[name]["ratio"] < 0.6
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    assert measured["bytes"] == sum(path.stat().st_size for path in files)
    assert 0 < measured["chance"] < 0.5 and measured["real_time_factor"] > 0
    assert measured["sets"] == {}
