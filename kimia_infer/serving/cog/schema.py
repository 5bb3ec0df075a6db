"""The OpenAPI schemas of the predictors, as Cog's build writes them.

An image gets its schema from the build; elsewhere the server needs one of these files. Command
lines read the inputs from them, so this module imports the standard library alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILES = {
    "Predictor": Path(__file__).with_name("schema.json"),
    "StreamingPredictor": Path(__file__).with_name("schema_streaming.json"),
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
    target = directory / ".cog" / "openapi_schema.json"
    target.parent.mkdir(parents=True)
    target.write_bytes(FILES[predictor].read_bytes())
