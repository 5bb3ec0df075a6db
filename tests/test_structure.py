"""Rules of the whole code base: which package may import which, and how long things may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.paths import ROOT

ORDER = [
    *("commands", "cluster", "serving", "evaluation", "training", "data", "api", "engine"),
    *("models", "layers", "audio", "weights", "utils"),
]
"""Packages of kimia_infer. Each one imports from itself and from those after it."""

LONGEST_FILE = 400
LONGEST_FUNCTION = 70

PROGRAMS = {"kimia_infer.serving.cog.probe"}
"""Modules that are run as programs, and print as commands do."""

MODULES = sorted((ROOT / "kimia_infer").rglob("*.py"))


def product_files() -> list[Path]:
    """All product code, the scripts without a suffix included."""
    scripts = [path for path in (ROOT / "scripts").rglob("*") if path.is_file()]
    python = [path for path in scripts if path.suffix == ".py" or path.suffix == ""]
    return [*MODULES, *sorted(python), ROOT / "predict.py"]


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def name_of(path: Path) -> str:
    """The module in ``path``; a package is called by its own name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path) for path in MODULES}


def imports(path: Path) -> Iterator[str]:
    """Modules that ``path`` imports, anywhere in it: inside functions and for types, too."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in NAMES else node.module


def test_packages_are_the_known_ones() -> None:
    found = {path.relative_to(ROOT).parts[1] for path in MODULES}
    assert {name for name in found if not name.endswith(".py")} <= set(ORDER)


def test_packages_import_one_way() -> None:
    upward = set()
    for path in MODULES:
        package = path.relative_to(ROOT).parts[1]
        if package == "__init__.py":
            continue
        for name in imports(path):
            parts = name.split(".")
            inside = parts[0] == "kimia_infer" and len(parts) > 1
            if inside and ORDER.index(parts[1]) < ORDER.index(package):
                upward.add((name_of(path), name))
    assert not upward


def test_training_needs_no_service() -> None:
    """Networks are trained without what answers requests; data is prepared without either."""
    serving = tuple(f"kimia_infer.{name}" for name in ("api", "engine", "serving", "commands"))
    found = {
        (name_of(path), name)
        for path in MODULES
        if path.relative_to(ROOT).parts[1] in ("training", "data")
        for name in imports(path)
        if name.startswith(serving)
    }
    assert not found


def test_the_library_imports_nothing_around_it() -> None:
    around = {"scripts", "tests", "predict"}
    found = [(str(p), name) for p in MODULES for name in imports(p) if name.split(".")[0] in around]
    assert not found


def test_modules_import_without_circles() -> None:
    graph = {name_of(path): set(imports(path)) & NAMES for path in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_models_import_transformers_when_they_are_built() -> None:
    """It takes seconds, which whoever only imports the library or starts a server would wait."""
    modules = ("kimia_infer.api.kimia", "kimia_infer.api.editx", "kimia_infer.serving.openai.app")
    code = f"import sys, {', '.join(modules)}; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_only_commands_print() -> None:
    """The library logs; a command's output is what it prints."""
    found = {
        name_of(path)
        for path in MODULES
        if path.relative_to(ROOT).parts[1] != "commands"
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if node.func.id == "print"
    }
    assert found == PROGRAMS


def test_files_have_one_subject() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in product_files()
    }
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FILE} == {}


def test_functions_fit_a_screen() -> None:
    found = {
        f"{path.relative_to(ROOT)}:{node.name}"
        for path in product_files()
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= LONGEST_FUNCTION
    }
    assert not found
