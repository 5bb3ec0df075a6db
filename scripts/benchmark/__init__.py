"""Speed and memory of the model, measured on this machine.

A GPU machine may have PyTorch and transformers alone. Without pydantic, its place is taken by what
requests need of it: classes with defaults that check nothing.
"""

import importlib.util
import inspect
import sys
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


def _validator(*names: str, **options: Any) -> Any:
    return lambda method: method


if importlib.util.find_spec("pydantic") is None:
    _pydantic = sys.modules["pydantic"] = ModuleType("pydantic")
    _pydantic.__dict__.update(
        BaseModel=BaseModel,
        ConfigDict=dict,
        Field=lambda default=None, **_: default,
        ValidationError=ValueError,
        field_validator=_validator,
        model_validator=_validator,
    )
