"""What KimiAudio uses of pydantic, without checks, for machines that do not have it.

A benchmark passes values that are right, and a GPU machine without network may have PyTorch and
transformers alone.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


class BaseModel:
    """Fields with defaults, set by name."""

    model_fields: dict[str, Any] = {}  # noqa: RUF012

    def __init_subclass__(cls) -> None:
        names = {**cls.model_fields, **inspect.get_annotations(cls)}
        cls.model_fields = {name: getattr(cls, name, None) for name in names}

    def __init__(self, **values: Any):
        self.__dict__.update(self.model_fields | values)

    def model_copy(self, *, update: dict[str, Any]) -> BaseModel:
        return type(self)(**self.__dict__ | update)


def field(default: Any = None, **_: Any) -> Any:
    return default


def validator(*_: Any, **__: Any) -> Callable[[Any], Any]:
    return lambda method: method


def provide_pydantic() -> None:
    """Make ``import pydantic`` work."""
    if importlib.util.find_spec("pydantic") is not None:
        return
    module = ModuleType("pydantic")
    contents = {
        "BaseModel": BaseModel,
        "ConfigDict": dict,
        "Field": field,
        "ValidationError": ValueError,
        "field_validator": validator,
        "model_validator": validator,
    }
    for name, value in contents.items():
        setattr(module, name, value)
    sys.modules["pydantic"] = module
