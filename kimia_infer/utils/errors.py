"""Errors that a caller can correct; the message says what is wrong and what to do."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError


class ConfigurationError(ValueError):
    """The model cannot be set up as asked, or the device lacks what that takes."""


class RequestError(ValueError):
    """A request cannot be served; the message names the field, the rule and the fix."""


class RequestTimeout(RequestError):
    """An answer was not complete within the time that the request allowed."""


class RequestOutOfMemory(RequestError):
    """A request needed more memory than the device has left; the next one can be served."""


class WeightsError(RuntimeError):
    """The weights cannot be found, fetched or prepared; the message says what to do."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the message names the file, the tensor and the reason."""


def explain(error: ValidationError) -> list[str]:
    """Each fault that pydantic found, as ``field: what is expected, found ...``."""
    return [_explain_one(fault) for fault in error.errors(include_url=False)]


def _explain_one(fault: Mapping[str, Any]) -> str:
    field = ".".join(str(place) for place in fault["loc"])
    if fault["type"] == "missing":
        text = "missing"
    elif fault["type"] == "extra_forbidden":
        text = "unknown field"
    elif "error" in fault.get("ctx", {}):  # raised by a validator, which says everything
        text = str(fault["ctx"]["error"])
    else:
        expected = fault["msg"].replace("Input should be", "expected", 1)
        text = f"{expected}, found {reprlib.repr(fault['input'])}"
    return f"{field}: {text}" if field else text
