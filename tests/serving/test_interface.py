"""The reader of predictor sources: equal to Python where it accepts, loud where Cog differs."""

from __future__ import annotations

import inspect
import json
import sys
import types
from pathlib import Path

import pytest
from cog.input import FieldInfo

from kimia_infer.serving.cog.interface import InterfaceError, read_interface
from tests.paths import ROOT

RECORDED = [
    json.loads(path.read_text())
    for path in sorted(Path(__file__).parent.glob("recorded_schema*.json"))
]
OWN = ["Predictor", "StreamingPredictor"]

SOURCE = """
from collections.abc import Iterator
from cog import BaseModel, BaseRunner, Input, Path, streaming
from pathlib import PurePath

LIMIT = 3

class Inputs:
    shared = Input(default=3, ge=1)
    twice = Input()
    twice = Input(default=1)
    plain = 3

class Part(BaseModel):
    word: str

class Output(BaseModel):
    text: str
    {field}

class Predictor(BaseRunner):
    {decorator}
    def run(self, {parameter}) -> {returns}:
        return Output(text="")
"""
PLAIN = {"parameter": "a: str = Input()", "field": "", "decorator": "", "returns": "Output"}


def annotation_name(kind: str, repeated: bool, nullable: bool) -> str:
    name = f"list[{kind}]" if repeated else kind
    return f"{name} | None" if nullable else name


@pytest.mark.parametrize("predictor", [*OWN, *(entry["predictor"] for entry in RECORDED)])
def test_reading_agrees_with_running(
    predictor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read from the source is what Cog's Input objects hold when Python runs it."""
    path = ROOT / "predict.py"
    if predictor not in OWN:
        (source,) = [entry["source"] for entry in RECORDED if entry["predictor"] == predictor]
        path = tmp_path / "predict.py"
        path.write_text("\n".join(source))
    monkeypatch.setitem(sys.modules, "under_test", types.ModuleType("under_test"))
    namespace = vars(sys.modules["under_test"])
    namespace["__file__"] = str(path)
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    run = namespace[predictor].run

    fields = read_interface(path, predictor).inputs
    parameters = [p for p in inspect.signature(run).parameters.values() if p.name != "self"]
    assert [f.name for f in fields] == [p.name for p in parameters]
    for field, parameter in zip(fields, parameters, strict=True):
        expected: FieldInfo = parameter.default
        assert annotation_name(field.kind, field.repeated, field.nullable) == parameter.annotation
        assert field.default == expected.default
        assert field.choices == (expected.choices and tuple(expected.choices))
        for option in ("description", "ge", "le", "min_length", "max_length", "accept"):
            assert getattr(field, option) == getattr(expected, option)


def read(tmp_path: Path, **parts: str):
    path = tmp_path / "predict.py"
    path.write_text(SOURCE.format(**PLAIN | parts))
    return read_interface(path, "Predictor")


def test_plain_source_is_accepted(tmp_path: Path) -> None:
    interface = read(tmp_path, parameter="a: str = Input(), b: int = Input(default=-3, ge=-3)")
    assert [(f.name, f.required, f.default) for f in interface.inputs] == [
        ("a", True, None),
        ("b", False, -3),
    ]


def test_shared_input_is_the_one_of_its_class(tmp_path: Path) -> None:
    (field,) = read(tmp_path, parameter="a: int = Inputs.shared").inputs
    assert (field.name, field.default, field.ge) == ("a", 3, 1)


def test_nested_outputs_and_streams_are_read(tmp_path: Path) -> None:
    interface = read(tmp_path, field="parts: list[Part] | None = None")
    text, parts = interface.outputs
    assert not interface.streaming and (text.kind, text.repeated) == ("str", False)
    assert (parts.kind, parts.repeated, parts.nullable) == ("Part", True, True)
    assert [field.name for field in parts.fields] == ["word"]
    streamed = read(tmp_path, decorator="@streaming", returns="Iterator[Output]")
    assert streamed.streaming and streamed.outputs == (text,)


MISREAD = {
    "unknown class of inputs": "a: int = Others.shared",
    "unknown shared input": "a: int = Inputs.other",
    "shared name given twice": "a: int = Inputs.twice",
    "shared plain value": "a: int = Inputs.plain",
    "bound by name": "a: int = Input(le=LIMIT)",
    "computed bound": "a: int = Input(le=2 ** 16)",
    "bound with underscores": "a: int = Input(le=10_000)",
    "bound in hexadecimal": "a: int = Input(le=0xff)",
    "f-string": "a: str = Input(description=f'up to {LIMIT}')",
    "joined strings": "a: str = Input(description='one ' 'two')",
    "escaped string": r"a: str = Input(description='it\'s')",
    "raw string": "a: str = Input(description=r'x')",
    "parenthesized string": "a: str = Input(description=('one'))",
    "tuple of choices": "a: str = Input(choices=('x', 'y'))",
    "choices by name": "a: str = Input(choices=LIMIT)",
    "imported type": "a: PurePath = Input()",
    "optional in the old style": "a: Optional[str] = Input()",
    "union": "a: str | int = Input()",
    "boolean default": "a: int = Input(default=True)",
    "unknown option": "a: int = Input(gt=3)",
    "positional default": "a: int = Input(3)",
    "no Input": "a: int = 3",
    "no default": "a: int",
    "no type": "a = Input()",
    "star": "*, a: int = Input()",
    "rest": "**a",
}


@pytest.mark.parametrize("parameter", MISREAD.values(), ids=MISREAD)
def test_misread_input_is_refused_with_its_line(parameter: str, tmp_path: Path) -> None:
    with pytest.raises(InterfaceError, match=r"predict\.py:\d+: "):
        read(tmp_path, parameter=parameter)


@pytest.mark.parametrize(
    "parts",
    [
        {"returns": "str"},
        {"returns": "Path | None"},
        {"returns": "Missing"},
        {"returns": "Iterator[Output]"},
        {"decorator": "@streaming"},
        {"decorator": "@streaming", "returns": "Iterator[str]"},
        {"decorator": "@streaming", "returns": "list[Output]"},
        {"field": "audio: list[list[Path]]"},
        {"field": "audio: Path = None"},
        {"field": "words: str | None = 'a'"},
        {"field": "part: Inputs"},
        {"field": "audio: PurePath"},
        {"field": "def method(self): pass"},
        {"decorator": "@staticmethod"},
    ],
    ids=str,
)
def test_unsupported_output_is_refused(parts: dict, tmp_path: Path) -> None:
    with pytest.raises(InterfaceError):
        read(tmp_path, **parts)


@pytest.mark.parametrize(
    ("imported", "message"),
    [
        ("from collections.abc import Iterator", "from collections.abc import Iterator"),
        (", streaming", "from cog import streaming"),
    ],
    ids=["Iterator", "streaming"],
)
def test_streaming_needs_its_imports(tmp_path: Path, imported: str, message: str) -> None:
    parts = PLAIN | {"decorator": "@streaming", "returns": "Iterator[Output]"}
    path = tmp_path / "predict.py"
    path.write_text(SOURCE.format(**parts).replace(imported, "", 1))
    with pytest.raises(InterfaceError, match=message):
        read_interface(path, "Predictor")


def test_path_of_another_module_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "predict.py"
    source = SOURCE.format(**PLAIN | {"parameter": "a: Path = Input()"})
    path.write_text(source.replace("Input, Path,", "Input,").replace("PurePath", "Path"))
    with pytest.raises(InterfaceError, match="from cog import Path"):
        read_interface(path, "Predictor")


def test_missing_class_and_method_are_named(tmp_path: Path) -> None:
    path = tmp_path / "predict.py"
    path.write_text("class Predictor:\n    pass\n")
    with pytest.raises(InterfaceError, match="no class Other"):
        read_interface(path, "Other")
    with pytest.raises(InterfaceError, match="Predictor has no plain method run"):
        read_interface(path, "Predictor")
