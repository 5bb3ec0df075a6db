"""The OpenAPI schemas of the predictors, as Cog's build writes them.

An image gets its schema from the build; elsewhere the server needs one of these files. Command
lines read the inputs from them, so this module imports nothing that has to be installed.
"""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

from kimia_infer.utils.files import write_text

log = logging.getLogger(__name__)

INSTALLED = Path(".cog", "openapi_schema.json")
"""Where Cog's server reads the schema from, in the directory that it runs in."""

FILES = {  # by predictor
    "Predictor": Path(__file__).with_name("schema.json"),
    "StreamingPredictor": Path(__file__).with_name("schema_streaming.json"),
    "EditXPredictor": Path(__file__).with_name("schema_editx.json"),
}


def read_schema(predictor: str) -> dict[str, Any]:
    return json.loads(FILES[predictor].read_text(encoding="utf-8"))


def read_inputs(predictor: str) -> dict[str, dict[str, Any]]:
    """The JSON schema of every input, with its choices in ``enum`` where it has some."""
    schemas = read_schema(predictor)["components"]["schemas"]
    inputs = schemas["Input"]["properties"].items()
    return {name: schemas.get(name, {}) | schema for name, schema in inputs}


def install_schema(predictor: str, directory: Path) -> None:
    """Put the schema where Cog's server looks for it when it is started in ``directory``."""
    target = directory / INSTALLED
    target.parent.mkdir(parents=True)
    target.write_bytes(FILES[predictor].read_bytes())


def accept_null(directory: Path) -> None:
    """Let the schema in ``directory`` accept the null that it declares, before Cog reads it."""
    path = directory / INSTALLED
    if not path.is_file():
        return
    try:
        write_text(path, json.dumps(with_null(json.loads(path.read_bytes()))))
    except OSError as error:
        log.warning("%s: %s; null is refused as the value of an input", path, error.strerror)


def with_null(document: dict[str, Any]) -> dict[str, Any]:
    """A schema with inputs that may be null in terms that Cog's server understands.

    Cog's build writes ``nullable``, of OpenAPI; its server (0.23) validates by JSON Schema, which
    does not have that word.
    """
    document = copy.deepcopy(document)
    for schema in document["components"]["schemas"]["Input"]["properties"].values():
        if schema.get("nullable") and "type" in schema:
            keys = [key for key in VALUE_KEYS if key in schema]
            schema["anyOf"] = [{key: schema.pop(key) for key in keys}, {"enum": [None]}]
    return document


VALUE_KEYS = ("type", "format", "minimum", "maximum", "items")
"""The keys of an input's schema that constrain its value."""
