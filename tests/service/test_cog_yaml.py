"""cog.yaml against the rules of Cog's build (0.23) and against the rest of the repository."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path

import pytest
import yaml

from kimia_infer.service.interface import read_interface
from kimia_infer.weights.published import MODEL

ROOT = Path(__file__).parents[2]
CONFIG = yaml.safe_load((ROOT / "cog.yaml").read_text())
ENVIRONMENT = dict(entry.split("=", 1) for entry in CONFIG["environment"])

RESERVED = [
    *("PATH", "LD_LIBRARY_PATH", "LIBRARY_PATH", "PYTHONPATH", "PYTHONUNBUFFERED", "VIRTUAL_ENV"),
    *("CUDA_*", "NVIDIA_*", "NV_*", "R8_*", "REPLICATE_*", "PGET_*", "KUBERNETES_*"),
    *("HF_ENDPOINT", "HF_HUB_ENABLE_HF_TRANSFER"),
]


def test_only_known_keys() -> None:
    assert CONFIG.keys() == {"build", "environment", "run"}
    known = "gpu cuda python_version system_packages python_requirements run"
    assert CONFIG["build"].keys() == set(known.split())


def test_run_names_a_predictor_that_the_build_can_read() -> None:
    file, _, predictor = CONFIG["run"].partition(":")
    assert read_interface(ROOT / file, predictor).inputs


def test_versions_are_strings_and_the_requirements_exist() -> None:
    build = CONFIG["build"]
    # Unquoted, YAML would make 3.10 of 3.1 and 13 of 13.0.
    assert re.fullmatch(r"3\.\d+", build["python_version"])
    assert re.fullmatch(r"\d+\.\d+", build["cuda"])
    assert (ROOT / build["python_requirements"]).is_file()


@pytest.mark.parametrize("command", CONFIG["build"]["run"], ids=range(len(CONFIG["build"]["run"])))
def test_build_commands_are_one_line_each(command: str) -> None:
    assert "\n" not in command.strip()


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_variables_are_not_reserved(name: str) -> None:
    assert not any(fnmatch.fnmatchcase(name, pattern) for pattern in RESERVED)


def test_weights_are_the_published_ones_at_the_pinned_revision() -> None:
    assert ENVIRONMENT["KIMI_AUDIO_WEIGHTS"] == f"{MODEL.name}@{MODEL.revision}"
