"""What pyproject.toml declares against what is pinned and what is imported."""

from __future__ import annotations

import re
import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
UNPINNED = {"kokoro-en", "kokoro-ja", "kokoro-zh", "ray"}
"""Extras that dev has not: those of misaki, which is imported where it is installed, and Ray."""
EXTRAS = {
    name: extra for name, extra in PROJECT["optional-dependencies"].items() if name not in UNPINNED
}


def pins(name: str) -> dict[str, str]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    found = [re.fullmatch(r"([\w.-]+)==([\w.]+)", line) for line in lines]
    return {canonicalize_name(pin[1]): pin[2] for pin in found if pin}


def ranges(lines: list[str]) -> dict[str, Requirement]:
    """Requirements by name, without those of the project itself."""
    parsed = {canonicalize_name(each.name): each for each in map(Requirement, lines)}
    parsed.pop(canonicalize_name(PROJECT["name"]), None)
    return parsed


def test_pins_are_those_of_the_declared_dependencies() -> None:
    serving = ranges(PROJECT["dependencies"] + EXTRAS["serve"] + EXTRAS["editx"])
    extras = ranges([each for extra in EXTRAS.values() for each in extra])
    tools = {name: each for name, each in extras.items() if name not in serving}
    for declared, pinned in (
        (serving, pins("requirements.txt")),
        (tools, pins("requirements-dev.txt")),
    ):
        assert declared.keys() == pinned.keys()
        outside = [n for n, version in pinned.items() if version not in declared[n].specifier]
        assert not outside


def test_the_image_of_editx_has_the_library_cog_and_the_extra() -> None:
    declared = ranges([*PROJECT["dependencies"], *EXTRAS["editx"]])
    pinned = pins("requirements-editx.txt")
    assert pinned.keys() == declared.keys() | {"cog"}
    known = pins("requirements.txt") | pins("requirements-dev.txt")
    assert pinned == {name: known[name] for name in pinned}


def test_a_cluster_has_the_extra_ray() -> None:
    declared = ranges(PROJECT["optional-dependencies"]["ray"])
    lines = (ROOT / "requirements-ray.txt").read_text().splitlines()
    pinned = ranges([line for line in lines if not line.startswith("#")])
    assert pinned.keys() == declared.keys()
    for name, pin in pinned.items():
        [version] = [each.version for each in pin.specifier]
        assert version in declared[name].specifier and pin.extras == declared[name].extras


def test_dev_has_every_extra() -> None:
    [itself] = [r for r in map(Requirement, EXTRAS["dev"]) if r.name == PROJECT["name"]]
    assert itself.extras == EXTRAS.keys() - {"dev"}


def test_a_gpu_machine_of_python_3_12_and_torch_2_11_is_in_range() -> None:
    declared = ranges(PROJECT["dependencies"])
    assert "3.12" in Requirement(f"x{PROJECT['requires-python']}").specifier
    assert "2.11.0" in declared["torch"].specifier
