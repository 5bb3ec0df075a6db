"""The files of Cog's build against its rules (0.23) and against the rest of the repository."""

from __future__ import annotations

import fnmatch
import re

import pytest
import yaml

from kimia_infer.models.kimi_audio.checkpoint import MODEL
from kimia_infer.models.step_audio_editx.layout import EDITX as EDITX_HUB
from kimia_infer.serving.cog.schema import FILES
from tests.paths import ROOT
from tests.serving.cog_schema import source_of

CONFIG = yaml.safe_load((ROOT / "cog.yaml").read_text())
STREAMING = yaml.safe_load((ROOT / "cog.streaming.yaml").read_text())
EDITX = yaml.safe_load((ROOT / "cog.editx.yaml").read_text())
ENVIRONMENT = dict(entry.split("=", 1) for entry in CONFIG["environment"])

RESERVED = [
    *("PATH", "LD_LIBRARY_PATH", "LIBRARY_PATH", "PYTHONPATH", "PYTHONUNBUFFERED", "VIRTUAL_ENV"),
    *("CUDA_*", "NVIDIA_*", "NV_*", "R8_*", "REPLICATE_*", "PGET_*", "KUBERNETES_*"),
    *("HF_ENDPOINT", "HF_HUB_ENABLE_HF_TRANSFER"),
]


def test_only_known_keys() -> None:
    assert CONFIG.keys() == {"build", "environment", "run"}
    known = "gpu cuda python_version system_packages python_requirements"
    assert CONFIG["build"].keys() == set(known.split())


def test_files_differ_in_the_predictor_alone() -> None:
    assert {**CONFIG, "run": None} == {**STREAMING, "run": None}


def test_the_image_of_editx_has_other_packages_and_weights() -> None:
    assert EDITX["build"] == CONFIG["build"] | {
        "python_requirements": "requirements-editx.txt",
        "system_packages": ["gcc", "libc6-dev"],
    }
    own = dict(entry.split("=", 1) for entry in EDITX["environment"])
    assert own.pop("KIMI_AUDIO_EDITX") == f"{EDITX_HUB.name}@{EDITX_HUB.revision}"
    assert own == {key: ENVIRONMENT[key] for key in ENVIRONMENT if key != "KIMI_AUDIO_WEIGHTS"}


def test_run_names_the_predictors_of_the_schema_files() -> None:
    runs = [config["run"] for config in (CONFIG, STREAMING, EDITX)]
    assert runs == [f"{source_of(name).name}:{name}" for name in FILES]


def test_versions_are_strings_and_the_requirements_exist() -> None:
    build = CONFIG["build"]
    # Unquoted, YAML would make 3.10 of 3.1 and 13 of 13.0.
    assert re.fullmatch(r"3\.\d+", build["python_version"])
    assert re.fullmatch(r"\d+\.\d+", build["cuda"])
    assert (ROOT / build["python_requirements"]).is_file()


def test_the_image_has_what_serves_openais_clients() -> None:
    """``python scripts/serve --openai`` of docs/deploy.md."""
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert not {"kimia_infer", "scripts", CONFIG["build"]["python_requirements"]} & set(ignored)


def test_kernels_can_be_compiled_in_the_image() -> None:
    assert {"gcc", "libc6-dev"} <= set(CONFIG["build"]["system_packages"])


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_variables_are_not_reserved(name: str) -> None:
    assert not any(fnmatch.fnmatchcase(name, pattern) for pattern in RESERVED)


def test_weights_are_the_published_ones_at_the_pinned_revision() -> None:
    assert ENVIRONMENT["KIMI_AUDIO_WEIGHTS"] == f"{MODEL.name}@{MODEL.revision}"
