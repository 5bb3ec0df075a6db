"""How a CPU serves a model: what is chosen by itself, and what does not fit."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kimia_infer.api import cpu, loading
from kimia_infer.api.cpu import CPU, check_host, choose_for_cpu, host_bytes, left_of_limits
from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.memory import GB, MemoryPlan
from kimia_infer.utils.errors import ConfigurationError
from scripts.benchmark.serving_memory import published_plan
from tests.paths import ROOT

MINI = ROOT / "weights" / "mini"


@pytest.fixture(scope="module")
def published() -> MemoryPlan:
    return replace(published_plan(), device=CPU, speech_device=CPU)


@pytest.mark.parametrize("half", [True, False])
def test_a_large_model_is_quantized_in_what_the_processor_multiplies(
    half: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu, "has_bfloat16", lambda device: half)
    assert choose_for_cpu(MINI, None, None) == (torch.float32, None)
    monkeypatch.setattr(cpu, "LARGE", 0)
    with caplog.at_level(logging.INFO, "kimia_infer"):
        chosen = choose_for_cpu(MINI, None, None)
    assert chosen == (torch.bfloat16 if half else torch.float32, "int4")
    said = f"quantization int4 (for a large model), {'bfloat16' if half else 'float32'}"
    assert said in caplog.text and f"{torch.get_num_threads()} threads" in caplog.text
    assert choose_for_cpu(MINI, torch.float32, "none") == (torch.float32, "none")


def test_what_does_not_fit_is_refused_with_figures(
    published: MemoryPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_host(published, "none", True, False, 64 * GB)
    with pytest.raises(ConfigurationError, match=r"needs 28\.6 GB .* where 24\.0 GB .*'int8'"):
        check_host(published, "none", True, False, 24 * GB)
    with pytest.raises(ConfigurationError, match="'int4' with text alone"):
        check_host(published, "int4", True, False, 14 * GB)
    with pytest.raises(ConfigurationError, match="nothing smaller fits"):
        check_host(published, "int4", False, True, 4 * GB)
    monkeypatch.setattr(loading, "available_memory", lambda: GB // 2)
    monkeypatch.setattr(loading, "load_modules", None)
    with pytest.raises(ConfigurationError, match=r"needs .* GB of RAM, where 0\.5 GB are"):
        KimiAudio(str(MINI), device="cpu")


def test_what_is_mapped_and_not_used_takes_nothing(published: MemoryPlan) -> None:
    """Layers of the audio track where there is no speech, and the embedding."""
    text, speech = (host_bytes(published, "int4", spoken, True) for spoken in (False, True))
    assert host_bytes(published, "int4", False, False) - text > 2 * GB
    assert speech > text and host_bytes(published, "int8", False, True) > text


def test_a_container_has_what_is_left_of_its_limit(tmp_path: Path) -> None:
    """Also of the limits around it; cached files are given up for programs."""
    own = tmp_path / "cgroup"
    assert left_of_limits(tmp_path, own) == []
    own.write_text("4:memory:/elsewhere\n0::/pods/mine\n")
    groups = {"pods/mine": ("max", 1, 0), "pods": ("8000", 5000, 3000), ".": ("9000", 9500, 100)}
    for name, (limit, used, cached) in groups.items():
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 7\nfile {cached}\nshmem 50\n")
    assert left_of_limits(tmp_path, own) == [5950, 0]
    own.write_text("0::/\n")  # as a container sees itself
    assert left_of_limits(tmp_path, own) == [0]
