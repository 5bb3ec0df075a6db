"""The inputs and outputs of a Cog predictor, read from its source as Cog's build reads them.

Cog's build never runs a predictor: it parses the file and writes the schema that requests
are validated against. Some Python it refuses, other Python it misreads without a word: a
bound given by a constant's name is dropped, a parenthesized description vanishes, escapes
are taken literally. This reader accepts only the subset that both Python and Cog (0.23)
understand alike and raises for everything else.
"""

from __future__ import annotations

import ast
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = ("str", "int", "float", "Path")

_OPTIONS = (
    "default",
    "description",
    "ge",
    "le",
    "min_length",
    "max_length",
    "choices",
    "accept",
)
_NUMBER = re.compile(r"-?(\d+|\d+\.\d*|\.\d+)(e[+-]?\d+)?")
_QUOTES = ('"""', "'''", '"', "'")


class InterfaceError(ValueError):
    """Cog's build would refuse or misread the predictor; the message names line and fix."""


@dataclass(frozen=True)
class InputField:
    """One parameter of ``run``.

    ``kind`` is one of :data:`KINDS`; ``repeated`` stands for ``list[kind]``. A field without
    ``has_default`` must be given, unless it is ``nullable``.
    """

    name: str
    kind: str
    repeated: bool = False
    nullable: bool = False
    has_default: bool = False
    default: Any = None
    description: str | None = None
    ge: float | None = None
    le: float | None = None
    min_length: int | None = None
    max_length: int | None = None
    choices: tuple[str | int, ...] | None = None
    accept: str | None = None

    @property
    def required(self) -> bool:
        return not self.has_default and not self.nullable


@dataclass(frozen=True)
class OutputField:
    """One field of the class that ``run`` returns."""

    name: str
    kind: str
    nullable: bool


@dataclass(frozen=True)
class Interface:
    """What a predictor takes and returns, in the order of the source."""

    inputs: tuple[InputField, ...]
    outputs: tuple[OutputField, ...]


def read_interface(path: str | os.PathLike[str], predictor: str) -> Interface:
    """Read the class ``predictor`` of the file ``path`` without running it.

    Raises:
        InterfaceError: something in it that Cog's build refuses or reads differently.
    """
    reader = _Reader(Path(path))
    run = reader.method(predictor, "run")
    return Interface(tuple(reader.inputs(run)), tuple(reader.outputs(run)))


class _Reader:
    def __init__(self, path: Path):
        self.path = path
        self.source = path.read_text(encoding="utf-8")
        body = ast.parse(self.source, str(path)).body
        self.classes = {node.name: node for node in body if isinstance(node, ast.ClassDef)}
        self.from_cog = {
            alias.name
            for node in body
            if isinstance(node, ast.ImportFrom) and node.module == "cog"
            for alias in node.names
            if alias.asname is None
        }

    def error(self, node: ast.AST, problem: str) -> InterfaceError:
        return InterfaceError(f"{self.path}:{getattr(node, 'lineno', 1)}: {problem}")

    def segment(self, node: ast.AST) -> str:
        return ast.get_source_segment(self.source, node) or ""

    def method(self, class_name: str, name: str) -> ast.FunctionDef:
        owner = self.classes.get(class_name)
        if owner is None:
            raise InterfaceError(f"{self.path}: no class {class_name}")
        for node in owner.body:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                if node.decorator_list:
                    raise self.error(node, f"{name} has a decorator; none is supported here")
                return node
        raise self.error(owner, f"{class_name} has no plain method {name}")

    def inputs(self, run: ast.FunctionDef) -> list[InputField]:
        arguments = run.args
        if arguments.posonlyargs or arguments.kwonlyargs or arguments.vararg or arguments.kwarg:
            raise self.error(run, "parameters must be plain: no *args, **kwargs, / or *")
        parameters = arguments.args[1:]
        if len(arguments.defaults) != len(parameters):
            raise self.error(run, "every parameter needs '= Input(...)'")
        return [self._input(*pair) for pair in zip(parameters, arguments.defaults, strict=True)]

    def outputs(self, run: ast.FunctionDef) -> list[OutputField]:
        returns = run.returns
        owner = self.classes.get(returns.id) if isinstance(returns, ast.Name) else None
        if owner is None or [self.segment(base) for base in owner.bases] != ["BaseModel"]:
            raise self.error(run, "run must return a BaseModel class of the same file")
        self._from_cog(owner, "BaseModel")
        fields = []
        for node in owner.body:
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                continue
            if not isinstance(node, ast.AnnAssign) or node.value is not None:
                raise self.error(node, "an output class holds only 'name: type' fields")
            kind, repeated, nullable = self._type(node.annotation)
            if repeated:
                raise self.error(node, "a list is not supported in an output class")
            fields.append(OutputField(self.segment(node.target), kind, nullable))
        return fields

    def _input(self, parameter: ast.arg, default: ast.expr) -> InputField:
        if parameter.annotation is None:
            raise self.error(parameter, f"{parameter.arg} has no type")
        kind, repeated, nullable = self._type(parameter.annotation)
        is_input = isinstance(default, ast.Call) and self.segment(default.func) == "Input"
        if not is_input or default.args:
            raise self.error(parameter, f"{parameter.arg} must be '= Input(name=value, ...)'")
        self._from_cog(parameter, "Input")
        options: dict[str, Any] = {}
        for keyword in default.keywords:
            if keyword.arg not in _OPTIONS:
                raise self.error(keyword, f"Input option {keyword.arg} is not supported here")
            options[keyword.arg] = self._option(keyword)
        if options.get("choices") is not None:
            options["choices"] = tuple(options["choices"])
        # To Cog a default of None means "no default" where the type does not allow None.
        has_default = "default" in options and (nullable or options["default"] is not None)
        return InputField(parameter.arg, kind, repeated, nullable, has_default, **options)

    def _from_cog(self, node: ast.AST, name: str) -> None:
        if name not in self.from_cog:
            raise self.error(node, f"{name} must be imported by 'from cog import {name}'")

    def _type(self, node: ast.expr) -> tuple[str, bool, bool]:
        """(kind, repeated, nullable) of ``kind``, ``list[kind]`` or one of them ``| None``."""
        nullable = isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr)
        if nullable:
            if not isinstance(node.right, ast.Constant) or node.right.value is not None:
                raise self.error(node, "the only union supported is 'type | None'")
            node = node.left
        repeated = isinstance(node, ast.Subscript) and self.segment(node.value) == "list"
        if repeated:
            node = node.slice
        if not isinstance(node, ast.Name) or node.id not in KINDS:
            raise self.error(node, f"type {self.segment(node)} is not supported: use {KINDS}")
        if node.id == "Path":
            self._from_cog(node, "Path")
        return node.id, repeated, nullable

    def _option(self, keyword: ast.keyword) -> Any:
        value = self._literal(keyword.value)
        # What stands between the name and the value: parentheses would hide it from Cog.
        rest = self.segment(keyword).removeprefix(keyword.arg or "").lstrip().removeprefix("=")
        if rest.strip() != self.segment(keyword.value):
            raise self.error(keyword, f"{keyword.arg}: write the value without parentheses")
        return value

    def _literal(self, node: ast.expr) -> Any:
        text = self.segment(node)
        if isinstance(node, ast.List):
            return [self._literal(element) for element in node.elts]
        try:
            value = ast.literal_eval(node)
        except ValueError:
            raise self.error(node, f"{text}: write the value itself, not an expression") from None
        if value is None:
            return None
        if isinstance(value, str):
            if not any(text == f"{quote}{value}{quote}" for quote in _QUOTES):
                raise self.error(node, f"{text}: write one plain string, without escapes")
            return value
        if type(value) not in (int, float) or not _NUMBER.fullmatch(text):
            raise self.error(node, f"{text}: only strings, plain decimal numbers, None and lists")
        return value
