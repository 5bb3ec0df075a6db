"""The schema files, the predictors and the model of their inputs say the same."""

from __future__ import annotations

import ast
import re
import types
from pathlib import Path

import pytest

from kimia_infer.serving.cog.inputs import MAX_FILES, CogInputs
from kimia_infer.serving.cog.schema import FILES, read_inputs, read_schema
from tests.paths import ROOT
from tests.serving.cog_schema import build_schema, load, recording

NOT_INPUTS = {"stop_repetition", "timeout_seconds"}
"""Parameters that a service sets itself."""


@pytest.fixture(scope="module")
def predictors() -> types.ModuleType:
    return load(ROOT / "predict.py")


@pytest.mark.parametrize(
    "name", ["recorded_schema", "recorded_schema_lists", "recorded_schema_streaming"]
)
def test_schemas_are_built_as_by_cogs_generator(name: str, tmp_path: Path) -> None:
    recorded = recording(name)
    (tmp_path / "predict.py").write_text("\n".join(recorded["source"]))
    schema = build_schema(load(tmp_path / "predict.py"), recorded["predictor"])
    # A running class does not tell a default of None from none; our inputs have all a default.
    schema["components"]["schemas"]["Input"]["properties"].get("optional_bare", {}).pop(
        "default", None
    )
    # The recording carries the version of the program that made it.
    assert {**schema, "info": None} == {**recorded["schema"], "info": None}


@pytest.mark.parametrize("predictor", FILES)
def test_file_is_the_schema_of_the_predictor(predictors: types.ModuleType, predictor: str) -> None:
    """If not: ``python -m tests.serving.cog_schema`` writes both files."""
    assert read_schema(predictor) == build_schema(predictors, predictor)


@pytest.mark.parametrize("predictor", FILES)
def test_inputs_are_those_of_the_model(predictor: str) -> None:
    model = CogInputs.model_json_schema()["properties"]
    inputs = read_inputs(predictor)
    absent = NOT_INPUTS if predictor == "StreamingPredictor" else NOT_INPUTS | {"preset"}
    assert set(inputs) == set(model) - absent
    for name, found in inputs.items():
        schema = model[name]
        assert found.get("nullable", False) == ("anyOf" in schema)
        schema = schema | schema.get("anyOf", [{}])[0]
        assert found["type"] == schema["type"]
        for key in ("description", "minimum", "maximum", "minLength", "maxLength", "enum"):
            assert found.get(key) == schema.get(key), (name, key)
        # A service that streams speaks early unless told otherwise.
        assert found["default"] == ("low_latency" if name == "preset" else schema["default"])
        if found["type"] == "array":
            assert schema["maxItems"] == MAX_FILES
        is_file = found.get("items", found).get("format") == "uri"
        assert is_file == (schema.get("items", schema).get("format") == "path")


def test_build_reads_the_inputs_as_python_does() -> None:
    """Cog's build parses the text: it drops or garbles all but plain literals, without a word."""
    source = (ROOT / "predict.py").read_text()
    tree = ast.parse(source)
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Input"
    ]
    assert len(calls) == len(read_inputs("StreamingPredictor"))
    literal = r'("[^"\\\n]*"|None|\[\]|-?\d+(\.\d+)?|\["[^"\\\n]*"(, "[^"\\\n]*")*\])'
    for call in calls:
        assert not call.args
        for keyword in call.keywords:
            text = ast.get_source_segment(source, keyword)
            assert re.fullmatch(rf"{keyword.arg}={literal}", text), text
    imported = {
        (node.module, alias.name)
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname is None
    }
    assert {
        ("cog", name) for name in ("BaseModel", "Input", "Path", "concurrent", "streaming")
    } <= imported
    assert ("collections.abc", "Iterator") in imported
    for node in ast.walk(tree):
        if isinstance(node, ast.AsyncFunctionDef):
            assert node.name == "run"
            names = [argument.arg for argument in node.args.args[1:]]
            assert [ast.unparse(d) for d in node.args.defaults] == [f"Inputs.{n}" for n in names]
