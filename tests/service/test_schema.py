"""The schema against what Cog's own generator wrote for the same source."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest

from kimia_infer.service.interface import read_interface
from kimia_infer.service.schema import SCHEMA_FILE, openapi_schema, write_schema

ROOT = Path(__file__).parents[2]
RECORDED = json.loads((Path(__file__).parent / "recorded_schema.json").read_text())


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recorded") / "predict.py"
    path.write_text("\n".join(RECORDED["source"]))
    return path


def test_schema_equals_the_one_of_cogs_build(recorded: Path) -> None:
    schema = openapi_schema(read_interface(recorded, RECORDED["predictor"]))
    assert schema["info"] == {"title": "Cog", "version": importlib.metadata.version("cog")}
    # The recording carries the version of the program that made it.
    assert {**schema, "info": None} == {**RECORDED["schema"], "info": None}


def test_written_file_is_the_schema(tmp_path: Path) -> None:
    interface = read_interface(ROOT / "predict.py", "Predictor")
    path = write_schema(interface, tmp_path)
    assert path == tmp_path / SCHEMA_FILE
    assert json.loads(path.read_text()) == openapi_schema(interface)
    assert list(path.parent.iterdir()) == [path]
