"""The schema that Cog's build writes for a predictor, and how the files in the package are made.

    python -m tests.serving.cog_schema

writes them anew after a change of a predictor. The parts that are the same for every
predictor come from schemas that Cog's own generator wrote (``recorded_schema*.json``); the
inputs and outputs are derived from the running classes.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import json
import sys
import types
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import cog

from kimia_infer.serving.cog.schema import FILES
from tests.paths import ROOT

TYPES = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    cog.Path: {"type": "string", "format": "uri"},
}
OPTIONS = {
    "description": "description",
    "ge": "minimum",
    "le": "maximum",
    "min_length": "minLength",
    "max_length": "maxLength",
    "accept": "x-cog-accept",
}

Json = dict[str, Any]


def recording(name: str) -> Json:
    """``source``, ``predictor`` and the ``schema`` that Cog's generator wrote for it."""
    return json.loads((Path(__file__).parent / f"{name}.json").read_text())


def load(path: Path) -> types.ModuleType:
    """A file with predictors as a module."""
    spec = importlib.util.spec_from_file_location(f"{path.stem}_of_{path.parent.name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where Cog's models look for it
    spec.loader.exec_module(module)
    return module


def build_schema(module: types.ModuleType, predictor: str) -> Json:
    """The complete OpenAPI document for a class of ``module``."""
    run = getattr(module, predictor).run
    hints = get_type_hints(run, vars(module))
    parameters = list(inspect.signature(run).parameters.values())[1:]
    output = hints["return"]
    streaming = get_origin(output) is not None
    template = recording("recorded_schema_streaming" if streaming else "recorded_schema")["schema"]
    common = ("PredictionRequest", "PredictionResponse", "Status")
    common += ("HTTPValidationError", "ValidationError")
    inputs = {
        parameter.name: _input(parameter.name, hints[parameter.name], parameter.default, order)
        for order, parameter in enumerate(parameters)
    }
    required = [
        parameter.name
        for parameter in parameters
        if "default" not in inputs[parameter.name] and not _unwrap(hints[parameter.name])[2]
    ]
    choices = {
        parameter.name: {
            "title": parameter.name,
            "description": "An enumeration.",
            "enum": list(parameter.default.choices),
            **TYPES[hints[parameter.name]],
        }
        for parameter in parameters
        if parameter.default.choices
    }
    result = _object(get_args(output)[0] if streaming else output, vars(module))
    if streaming:
        result = {"type": "array", "items": result, "x-cog-array-type": "iterator"}
    schemas = {
        "Input": {
            "title": "Input",
            "type": "object",
            "properties": inputs,
            **({"required": required} if required else {}),
        },
        "Output": {"title": "Output"} | result,
        **choices,
        **{name: template["components"]["schemas"][name] for name in common},
    }
    version = importlib.metadata.version("cog")
    return template | {
        "info": {"title": "Cog", "version": version},
        "components": {"schemas": schemas},
    }


def _input(name: str, hint: Any, field: Any, order: int) -> Json:
    kind, repeated, nullable = _unwrap(hint)
    schema: Json = {"x-order": order}
    if field.choices:
        schema["allOf"] = [{"$ref": f"#/components/schemas/{name}"}]
    else:
        items = TYPES[kind]
        schema["title"] = _title(name)
        schema |= {"type": "array", "items": items} if repeated else items
    # To Cog a default of None means "no default" where the type does not allow None.
    if nullable or field.default is not None:
        schema["default"] = field.default
    if nullable:
        schema["nullable"] = True
    values = {key: getattr(field, option) for option, key in OPTIONS.items()}
    return schema | {key: value for key, value in values.items() if value is not None}


def _object(owner: type, namespace: Json) -> Json:
    properties, required = {}, []
    for name, hint in get_type_hints(owner, namespace).items():
        kind, repeated, nullable = _unwrap(hint)
        field = TYPES[kind] if kind in TYPES else _object(kind, namespace)
        field = {"type": "array", "items": field} if repeated else dict(field)
        properties[name] = (
            field | {"title": _title(name)} | ({"nullable": True} if nullable else {})
        )
        required += [] if nullable else [name]
    schema = {"type": "object", "properties": properties}
    return schema | ({"required": required} if required else {})


def _unwrap(hint: Any) -> tuple[Any, bool, bool]:
    """(inner, repeated, nullable) of ``inner``, ``list[inner]`` or either ``| None``."""
    nullable = isinstance(hint, types.UnionType)
    if nullable:
        hint = get_args(hint)[0]
    repeated = get_origin(hint) is list
    return (get_args(hint)[0] if repeated else hint), repeated, nullable


def _title(name: str) -> str:
    return " ".join(part[:1].upper() + part[1:] for part in name.split("_"))


def text(value: Any, indent: str = "") -> str:
    """JSON with short objects on one line."""
    line = json.dumps(value)
    if not isinstance(value, dict) or len(indent) + len(line) <= 100:
        return line
    inner = indent + "  "
    entries = [f"{inner}{json.dumps(key)}: {text(item, inner)}" for key, item in value.items()]
    return "{\n" + ",\n".join(entries) + f"\n{indent}}}"


def source_of(predictor: str) -> Path:
    """The file that Cog's build reads."""
    return ROOT / ("predict_editx.py" if predictor == "EditXPredictor" else "predict.py")


if __name__ == "__main__":
    for name, file in FILES.items():
        file.write_text(text(build_schema(load(source_of(name)), name)) + "\n")
