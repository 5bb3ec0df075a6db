"""Figures and pictures of a checkpoint; here of an untrained one, which says nothing right."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kimia_infer.audio.files import load_audio
from kimia_infer.audio.mel import MelConfig, log_mel
from kimia_infer.training.tasks.recordings import Recording
from kimia_infer.utils.files import write_json_lines
from scripts.miniature import figures
from scripts.miniature.figures import (
    FIGURES,
    PICTURE,
    HeldOut,
    codec_versions,
    recalls,
    write_figures,
)
from scripts.miniature.scoring import load_model, recognizable
from scripts.miniature.spoken_world import (
    WorldSize,
    write_world,
)
from scripts.miniature.world import core
from tests.spoken import answer_texts, speak_answers
from tests.training.runs import write_sound

CODES = 20
"""More than the first chunk of a stream takes, fewer than one of a whole synthesis."""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "world"
    write_world(folder, WorldSize(1, 1, 20, 1), core)
    answers, voice = answer_texts([folder / "held_out.jsonl"]), folder.parent / "voice"
    texts = [text for text in answers.values() if len(text.split()) > 3][:4]
    speak_answers(answers | {voice / f"{i}.wav": text for i, text in enumerate(texts)})
    read = [{"audio": f"{i}.wav", "text": text} for i, text in enumerate(texts)]
    write_json_lines(voice / "held_out.jsonl", read)
    return folder


def test_figures_are_written(untrained: Path, world: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(figures, "TIMED", 1)
    monkeypatch.setattr(figures, "measure", lambda *_: {"sets": {}})
    monkeypatch.setattr("scripts.miniature.scoring.MOST_STEPS", 30)
    monkeypatch.setattr("scripts.miniature.recognizer.LISTENS", 1)
    monkeypatch.setattr(figures, "measure_people", lambda *_: {})
    monkeypatch.setattr(figures, "measure_long", lambda *_: {})
    held_out = HeldOut(world, tmp_path, world.parent / "voice", tmp_path)
    measured = write_figures(untrained, held_out, tmp_path / "out", limit=2)
    assert json.loads((tmp_path / "out" / FIGURES).read_text()) == measured
    assert (tmp_path / "out" / PICTURE).read_bytes().startswith(b"\x89PNG")
    codec, read = measured["codec"], measured["read_aloud"]
    assert codec["original"]["recall"] > 0.8 and codec["original"]["ratio"] == 1
    assert codec["original"]["sentences"] == 4
    # Nothing is learned, so what is understood is chance.
    for name in ("one-shot", "streamed"):
        assert codec[name]["ratio"] < 0.6
        assert read[name]["ratio"] < 0.6
    files = [path for path in untrained.rglob("*") if path.is_file()]
    assert measured["bytes"] == sum(path.stat().st_size for path in files)
    assert 0 <= measured["chance"] < 0.5 and measured["real_time_factor"] > 0
    assert measured["sets"] == {}


def test_versions_of_a_recording(untrained: Path, tmp_path: Path):
    model, mel = load_model(untrained), MelConfig.from_directory(untrained / "vocoder")
    path = write_sound(tmp_path / "a.wav", CODES * 0.08, 3)
    found = codec_versions(model, mel, Recording("here", path, "red"))
    assert list(found) == ["original", "vocoded", "one-shot", "streamed"]
    assert np.array_equal(found["original"], load_audio(path))
    for name in ("vocoded", "one-shot", "streamed"):
        assert abs(len(found[name]) - CODES * 1280) <= 640, name
    # Other chunks begin with other noise and are faded.
    assert not np.allclose(found["one-shot"], found["streamed"][: len(found["one-shot"])])
    wave = torch.from_numpy(load_audio(path, sample_rate=24_000))
    with torch.inference_mode():
        vocoded = recognizable(model.detokenizer.vocoder(log_mel(wave, mel)))
    assert np.array_equal(found["vocoded"], vocoded)


def test_every_version_is_recognized(world: Path):
    voice = world.parent / "voice"
    recordings = figures.find_recordings(voice / "held_out.jsonl", voice)[:2]

    def versions(recording: Recording) -> dict[str, np.ndarray]:
        original = load_audio(recording.path)
        return {"original": original, "silent": np.zeros(0), "again": original}

    found = recalls(recordings, versions)
    assert found["again"] == found["original"]
    assert found["original"]["recall"] > 0.8 and found["original"]["ratio"] == 1
    assert found["silent"] == {"sentences": 2, "recall": 0.0, "ratio": 0.0}
