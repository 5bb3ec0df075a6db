"""The inputs and outputs of a Cog predictor, read from its source as Cog's build reads them.

Cog's build never runs a predictor: it parses the file and writes the schema that requests
are validated against. Some Python it refuses, other Python it misreads without a word: a
bound given by a constant's name is dropped, a parenthesized description vanishes, escapes
are taken literally. This reader accepts only the subset that both Python and Cog (0.23)
understand alike and raises for everything else. Inputs that several predictors share stand in a
class of the same file, ``class Inputs: text = Input(...)``, and are referred to as
``text: str = Inputs.text``.
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
    """One field of the class that ``run`` returns, or yields.

    ``kind`` is one of :data:`KINDS`, or the name of a class with the ``fields`` given;
    ``repeated`` stands for ``list[kind]``.
    """

    name: str
    kind: str
    nullable: bool
    repeated: bool = False
    fields: tuple[OutputField, ...] = ()


@dataclass(frozen=True)
class Interface:
    """What a predictor takes and returns, in the order of the source.

    A ``streaming`` one yields objects with the fields ``outputs``, one after the other.
    """

    inputs: tuple[InputField, ...]
    outputs: tuple[OutputField, ...]
    streaming: bool = False


def read_interface(path: str | os.PathLike[str], predictor: str) -> Interface:
    """Read the class ``predictor`` of the file ``path`` without running it.

    Raises:
        InterfaceError: something in it that Cog's build refuses or reads differently.
    """
    reader = _Reader(Path(path))
    run = reader.method(predictor, "run")
    streaming = reader.streaming(run)
    outputs = reader.outputs(run, streaming)
    return Interface(tuple(reader.inputs(run)), tuple(outputs), streaming)


class _Reader:
    def __init__(self, path: Path):
        self.path = path
        self.source = path.read_text(encoding="utf-8")
        body = ast.parse(self.source, str(path)).body
        self.classes = {node.name: node for node in body if isinstance(node, ast.ClassDef)}
        self.imported = {
            (node.module, alias.name)
            for node in body
            if isinstance(node, ast.ImportFrom)
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
                return node
        raise self.error(owner, f"{class_name} has no plain method {name}")

    def streaming(self, run: ast.FunctionDef) -> bool:
        decorators = [self.segment(node) for node in run.decorator_list]
        if decorators not in ([], ["streaming"]):
            raise self.error(run, "run may have no decorator but @streaming")
        if decorators:
            self._imported_from("cog", run, "streaming")
        return bool(decorators)

    def inputs(self, run: ast.FunctionDef) -> list[InputField]:
        arguments = run.args
        if arguments.posonlyargs or arguments.kwonlyargs or arguments.vararg or arguments.kwarg:
            raise self.error(run, "parameters must be plain: no *args, **kwargs, / or *")
        parameters = arguments.args[1:]
        if len(arguments.defaults) != len(parameters):
            raise self.error(run, "every parameter needs '= Input(...)'")
        return [self._input(*pair) for pair in zip(parameters, arguments.defaults, strict=True)]

    def outputs(self, run: ast.FunctionDef, streaming: bool) -> list[OutputField]:
        returns = run.returns
        if streaming:
            if not isinstance(returns, ast.Subscript) or self.segment(returns.value) != "Iterator":
                raise self.error(run, "run has @streaming, so it must return Iterator[...]")
            self._imported_from("collections.abc", run, "Iterator")
            returns = returns.slice
        owner = self._model(returns)
        if owner is None:
            raise self.error(run, "run must return a BaseModel class of the same file")
        return self._output_fields(owner)

    def _model(self, node: ast.expr | None) -> ast.ClassDef | None:
        """The output class that ``node`` names, if it is one of this file."""
        owner = self.classes.get(node.id) if isinstance(node, ast.Name) else None
        if owner is None or [self.segment(base) for base in owner.bases] != ["BaseModel"]:
            return None
        self._imported_from("cog", owner, "BaseModel")
        return owner

    def _output_fields(self, owner: ast.ClassDef, nested: bool = False) -> list[OutputField]:
        fields = []
        for node in owner.body:
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                continue
            if not isinstance(node, ast.AnnAssign):
                raise self.error(node, "an output class holds only 'name: type' fields")
            inner, repeated, nullable = self._unwrap(node.annotation)
            if node.value is not None and not (nullable and self.segment(node.value) == "None"):
                raise self.error(node, "the only default supported is None, of 'type | None'")
            owned = None if nested else self._model(inner)
            fields.append(
                OutputField(
                    self.segment(node.target),
                    self._kind(inner) if owned is None else owned.name,
                    nullable,
                    repeated,
                    tuple(self._output_fields(owned, nested=True)) if owned else (),
                )
            )
        return fields

    def _input(self, parameter: ast.arg, default: ast.expr) -> InputField:
        if parameter.annotation is None:
            raise self.error(parameter, f"{parameter.arg} has no type")
        inner, repeated, nullable = self._unwrap(parameter.annotation)
        kind = self._kind(inner)
        if isinstance(default, ast.Attribute):
            default = self._shared(parameter, default)
        is_input = isinstance(default, ast.Call) and self.segment(default.func) == "Input"
        if not is_input or default.args:
            raise self.error(parameter, f"{parameter.arg} must be '= Input(name=value, ...)'")
        self._imported_from("cog", parameter, "Input")
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

    def _shared(self, parameter: ast.arg, reference: ast.Attribute) -> ast.expr:
        """What a class of this file assigns to the name that ``reference`` stands for."""
        text = self.segment(reference)
        owner = self.classes.get(self.segment(reference.value))
        values = [
            node.value
            for node in (owner.body if owner is not None else ())
            if isinstance(node, ast.Assign)
            and [self.segment(target) for target in node.targets] == [reference.attr]
        ]
        if len(values) != 1:
            raise self.error(parameter, f"{text}: expected one '{reference.attr} = Input(...)'")
        return values[0]

    def _imported_from(self, module: str, node: ast.AST, name: str) -> None:
        if (module, name) not in self.imported:
            raise self.error(node, f"{name} must be imported by 'from {module} import {name}'")

    def _unwrap(self, node: ast.expr) -> tuple[ast.expr, bool, bool]:
        """(inner, repeated, nullable) of ``inner``, ``list[inner]`` or either ``| None``."""
        nullable = False
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            nullable = True
            if not isinstance(node.right, ast.Constant) or node.right.value is not None:
                raise self.error(node, "the only union supported is 'type | None'")
            node = node.left
        repeated = isinstance(node, ast.Subscript) and self.segment(node.value) == "list"
        return (node.slice if repeated else node), repeated, nullable

    def _kind(self, node: ast.expr) -> str:
        if not isinstance(node, ast.Name) or node.id not in KINDS:
            raise self.error(node, f"type {self.segment(node)} is not supported: use {KINDS}")
        if node.id == "Path":
            self._imported_from("cog", node, "Path")
        return node.id

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
