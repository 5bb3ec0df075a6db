"""The schema against what Cog's own generator wrote for the same source."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest

from kimia_infer.serving.cog.interface import read_interface
from kimia_infer.serving.cog.schema import SCHEMA_FILE, openapi_schema, write_schema
from tests.paths import ROOT

RECORDINGS = sorted(Path(__file__).parent.glob("recorded_schema*.json"))


@pytest.mark.parametrize("recording", RECORDINGS, ids=lambda path: path.stem)
def test_schema_equals_the_one_of_cogs_build(recording: Path, tmp_path: Path) -> None:
    recorded = json.loads(recording.read_text())
    (tmp_path / "predict.py").write_text("\n".join(recorded["source"]))
    schema = openapi_schema(read_interface(tmp_path / "predict.py", recorded["predictor"]))
    assert schema["info"] == {"title": "Cog", "version": importlib.metadata.version("cog")}
    # The recording carries the version of the program that made it.
    assert {**schema, "info": None} == {**recorded["schema"], "info": None}


@pytest.mark.parametrize("predictor", ["Predictor", "StreamingPredictor"])
def test_written_file_is_the_schema(predictor: str, tmp_path: Path) -> None:
    interface = read_interface(ROOT / "predict.py", predictor)
    path = write_schema(interface, tmp_path)
    assert path == tmp_path / SCHEMA_FILE
    assert json.loads(path.read_text()) == openapi_schema(interface)
    assert list(path.parent.iterdir()) == [path]
