"""When Triton kernels are used, and what is said to be lacking otherwise."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kimia_infer.layers import triton_support

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A machine that has everything, whatever this one has."""
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(triton_support, "_python_headers", lambda: tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("CC", raising=False)
    triton_support.missing.cache_clear()
    yield
    triton_support.missing.cache_clear()


def test_cuda_alone_can_use_kernels() -> None:
    assert triton_support.missing(CUDA) is None
    assert triton_support.available(CUDA)
    assert "cpu" in triton_support.missing(CPU)
    assert not triton_support.available(CPU)


def test_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "package triton" in triton_support.missing(CUDA)


def test_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "C compiler" in triton_support.missing(CUDA)


@pytest.mark.parametrize("name", ["gcc", "clang"])
def test_either_compiler_will_do(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(shutil, "which", lambda asked: name if asked == name else None)
    assert triton_support.available(CUDA)


def test_named_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv("CC", "tcc")
    assert triton_support.available(CUDA)


def test_headers(tmp_path: Path) -> None:
    (tmp_path / "Python.h").unlink()
    assert "Python.h" in triton_support.missing(CUDA)


def test_interpreter_runs_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_support.available(CPU)


def test_answer_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert triton_support.available(CUDA)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: pytest.fail("asked again"))
    assert triton_support.available(CUDA)


def test_decided_without_importing_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it would fail
    assert triton_support.available(CUDA)
