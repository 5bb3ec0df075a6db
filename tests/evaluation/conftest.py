"""The miniature, loaded once, manifests for it, and runs of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.evaluation.items import Defaults, Manifest, read_manifest
from kimia_infer.evaluation.results import EvaluationConfig
from kimia_infer.evaluation.run import Summary, evaluate
from kimia_infer.utils.files import write_json_lines
from tests.evaluation.helpers import CONFIG, Run, Write
from tests.paths import MINI
from tests.training.runs import write_sound

QUESTION = "What is it?\n(A) dog (B) cat"


@pytest.fixture(scope="session")
def model() -> KimiAudio:
    return KimiAudio(str(MINI), load_detokenizer=False, device="cpu", head_rows="track")


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    return write_sound(tmp_path / "sound.wav", 0.4, 0)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a JSON Lines file of rows."""

    def write_rows(*rows: object, name: str = "set") -> Path:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        return path

    return write_rows


@pytest.fixture(scope="session")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recordings")
    write_sound(folder / "long.wav", 0.9, 1)
    write_sound(folder / "short.wav", 0.3, 2)
    return folder


@pytest.fixture(scope="session")
def manifest(recordings: Path) -> Manifest:
    """Every metric, two subsets, a file that is missing and a line that is bad."""
    rows = [
        {"audio": "long.wav", "text": "red green blue", "subset": "clean"},
        {"audio": "short.wav", "text": "dog cat", "subset": "clean"},
        {"audio": "short.wav", "text": "six", "subset": "other"},
        {"audio": "missing.wav", "text": "seven", "subset": "other"},
        {"audio": "short.wav", "text": "  "},
        {"audio": "short.wav", "text": "你好", "language": "zh"},
        {"audio": "long.wav", "question": QUESTION, "choices": ["dog", "cat"], "answer": "cat"},
        {"audio": "long.wav", "question": "Where?", "answer": "here", "metric": "match"},
        {"audio": "long.wav", "question": "", "metric": "none"},
        {"audio": "long.wav", "text": "two", "start": 0.2, "end": 0.6, "dataset": "Excerpts"},
    ]
    write_json_lines(recordings / "set.jsonl", rows)
    return read_manifest(recordings / "set.jsonl", Defaults(recordings, language="en"))


@pytest.fixture
def missing_file(recordings: Path) -> Iterator[None]:
    """The file that is missing otherwise."""
    path = write_sound(recordings / "missing.wav", 0.3, 3)
    yield
    path.unlink()


@pytest.fixture
def run(tmp_path: Path, model: KimiAudio, manifest: Manifest) -> Run:
    """Evaluates the manifest into a folder of the test."""

    def run_into(folder: str, config: EvaluationConfig = CONFIG, **more) -> Summary:
        return evaluate([manifest], config, tmp_path / folder, lambda config: model, **more)

    return run_into


@pytest.fixture(scope="session")
def _finished_run(
    tmp_path_factory: pytest.TempPathFactory, model: KimiAudio, manifest: Manifest
) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    evaluate([manifest], CONFIG, folder, lambda config: model)
    return folder


@pytest.fixture
def finished(_finished_run: Path, tmp_path: Path) -> Path:
    """The folder of a finished run, ``finished`` for ``run``; a copy, which may be changed."""
    return shutil.copytree(_finished_run, tmp_path / "finished")
