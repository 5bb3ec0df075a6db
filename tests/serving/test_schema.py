"""The schema files, the predictors and the model of their inputs say the same."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from kimia_infer.serving.cog.editing import EditXInputs
from kimia_infer.serving.cog.inputs import MAX_FILES, CogInputs
from kimia_infer.serving.cog.schema import FILES, read_inputs, read_schema
from tests.serving.cog_schema import build_schema, load, recording, source_of

NOT_INPUTS = {"stop_repetition", "timeout_seconds"}
"""Parameters that a service sets itself."""


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
def test_file_is_the_schema_of_the_predictor(predictor: str) -> None:
    """If not: ``python -m tests.serving.cog_schema`` writes the files."""
    assert read_schema(predictor) == build_schema(load(source_of(predictor)), predictor)


@pytest.mark.parametrize("predictor", FILES)
def test_inputs_are_those_of_the_model(predictor: str) -> None:
    kind = EditXInputs if predictor == "EditXPredictor" else CogInputs
    model = kind.model_json_schema()["properties"]
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


@pytest.mark.parametrize("predictor", ["StreamingPredictor", "EditXPredictor"])
def test_build_reads_the_inputs_as_python_does(predictor: str) -> None:
    """Cog's build parses the text: it drops or garbles all but plain literals, without a word."""
    source = source_of(predictor).read_text()
    tree = ast.parse(source)
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Input"
    ]
    assert len(calls) == len(read_inputs(predictor))
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
    names = {"BaseModel", "Input", "Path", "concurrent", "streaming"}
    if predictor == "EditXPredictor":
        names.remove("streaming")
    else:
        assert ("collections.abc", "Iterator") in imported
    assert {("cog", name) for name in names} <= imported
    for node in ast.walk(tree):
        if isinstance(node, ast.AsyncFunctionDef):
            assert node.name == "run"
            names = [argument.arg for argument in node.args.args[1:]]
            assert [ast.unparse(d) for d in node.args.defaults] == [f"Inputs.{n}" for n in names]
