"""The OpenAPI document that Cog's build writes for a predictor (Cog 0.23).

The server validates requests against ``.cog/openapi_schema.json`` in its working directory
and never writes that file itself; in an image the build has put it there. Layout and wording
follow the published schema generator of Cog.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

from kimia_infer.serving.cog.interface import InputField, Interface, OutputField

SCHEMA_FILE = Path(".cog") / "openapi_schema.json"

_TYPES = {
    "str": {"type": "string"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "Path": {"type": "string", "format": "uri"},
}
_OPTIONS = {
    "description": "description",
    "ge": "minimum",
    "le": "maximum",
    "min_length": "minLength",
    "max_length": "maxLength",
    "accept": "x-cog-accept",
}
_STATUSES = ["starting", "processing", "succeeded", "canceled", "failed"]

Json = dict[str, Any]


def write_schema(interface: Interface, directory: str | os.PathLike[str]) -> Path:
    """Write the schema where a server started in ``directory`` looks for it."""
    path = Path(directory) / SCHEMA_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    partial.write_text(json.dumps(openapi_schema(interface)), encoding="utf-8")
    partial.replace(path)
    return path


def openapi_schema(interface: Interface) -> Json:
    """The complete OpenAPI 3.0.2 document."""
    return {
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": importlib.metadata.version("cog")},
        "paths": _paths(interface.streaming),
        "components": {
            "schemas": {
                "Input": _input_schema(interface.inputs),
                "Output": _output_schema(interface),
                **{f.name: _choices(f) for f in interface.inputs if f.choices is not None},
                **_envelopes(),
            }
        },
    }


def _title(name: str) -> str:
    return " ".join(part[:1].upper() + part[1:] for part in name.split("_"))


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _input_schema(fields: tuple[InputField, ...]) -> Json:
    schema: Json = {
        "title": "Input",
        "type": "object",
        "properties": {field.name: _property(field, i) for i, field in enumerate(fields)},
    }
    required = [field.name for field in fields if field.required]
    return schema | ({"required": required} if required else {})


def _property(field: InputField, order: int) -> Json:
    schema: Json = {"x-order": order}
    if field.choices is not None:
        schema["allOf"] = [_ref(field.name)]
    else:
        kind = dict(_TYPES[field.kind])
        schema |= {"title": _title(field.name)}
        schema |= {"type": "array", "items": kind} if field.repeated else kind
    if field.has_default:
        schema["default"] = field.default
    if field.nullable:
        schema["nullable"] = True
    for option, key in _OPTIONS.items():
        if (value := getattr(field, option)) is not None:
            schema[key] = value
    return schema


def _choices(field: InputField) -> Json:
    return {
        "title": field.name,
        "description": "An enumeration.",
        "enum": list(field.choices or ()),
        **_TYPES[field.kind],
    }


def _output_schema(interface: Interface) -> Json:
    schema = _object(interface.outputs)
    if interface.streaming:
        schema = {"type": "array", "items": schema, "x-cog-array-type": "iterator"}
    return {"title": "Output", **schema}


def _object(fields: tuple[OutputField, ...]) -> Json:
    properties = {
        field.name: {
            **_output_type(field),
            **({"nullable": True} if field.nullable else {}),
            "title": _title(field.name),
        }
        for field in fields
    }
    required = [field.name for field in fields if not field.nullable]
    schema = {"type": "object", "properties": properties}
    return schema | ({"required": required} if required else {})


def _output_type(field: OutputField) -> Json:
    schema = _object(field.fields) if field.fields else _TYPES[field.kind]
    return {"type": "array", "items": schema} if field.repeated else schema


def _string(title: str, **more: str) -> Json:
    return {"title": title, "type": "string", **more}


def _envelopes() -> Json:
    """The components around inputs and outputs, the same for every predictor."""
    moments = ("created_at", "started_at", "completed_at")
    response = {
        "input": _ref("Input"),
        "output": _ref("Output"),
        **{name: _string(_title(name)) for name in ("id", "version", "status", "error", "logs")},
        **{name: _string(_title(name), format="date-time") for name in moments},
        "metrics": {"title": "Metrics", "type": "object"},
    }
    location = {"anyOf": [{"type": "string"}, {"type": "integer"}]}
    return {
        "PredictionRequest": {
            "title": "PredictionRequest",
            "type": "object",
            "properties": {"id": _string("Id"), "input": _ref("Input")},
        },
        "PredictionResponse": {
            "title": "PredictionResponse",
            "type": "object",
            "properties": response,
        },
        "Status": {"description": "An enumeration.", "enum": _STATUSES, **_string("Status")},
        "HTTPValidationError": {
            "title": "HTTPValidationError",
            "type": "object",
            "properties": {
                "detail": {"title": "Detail", "type": "array", "items": _ref("ValidationError")}
            },
        },
        "ValidationError": {
            "title": "ValidationError",
            "required": ["loc", "msg", "type"],
            "type": "object",
            "properties": {
                "loc": {"title": "Location", "type": "array", "items": location},
                "msg": _string("Message"),
                "type": _string("Error Type"),
            },
        },
    }


def _paths(streaming: bool) -> Json:
    prediction_id = {
        "required": True,
        "schema": _string("Prediction Id"),
        "name": "prediction_id",
        "in": "path",
    }
    return {
        "/": {"get": _operation("Root", "root__get")},
        "/health-check": {"get": _operation("Healthcheck", "healthcheck_health_check_get")},
        "/predictions": {
            "post": _operation(
                "Predict", "predict_predictions_post", _ref("PredictionResponse"), validated=True
            )
            | {
                "description": "Run a single prediction on the model",
                "requestBody": {"content": _content(_ref("PredictionRequest"))},
            }
            | ({"x-cog-streaming": True} if streaming else {})
        },
        "/predictions/{prediction_id}/cancel": {
            "post": _operation(
                "Cancel", "cancel_predictions__prediction_id__cancel_post", validated=True
            )
            | {"parameters": [prediction_id]}
        },
    }


def _operation(
    summary: str, identity: str, answer: Json | None = None, validated: bool = False
) -> Json:
    responses = {"200": {"description": "Successful Response", "content": _content(answer or {})}}
    if validated:
        content = _content(_ref("HTTPValidationError"))
        responses["422"] = {"description": "Validation Error", "content": content}
    return {"summary": summary, "operationId": identity, "responses": responses}


def _content(schema: Json) -> Json:
    return {"application/json": {"schema": schema}}
