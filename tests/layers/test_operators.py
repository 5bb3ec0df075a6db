"""The fused operators: when Triton is used, what is missing otherwise, and their fakes."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kimia_infer.layers import attention, operators, quantization
from kimia_infer.layers.quantization import STORAGES, quantize
from kimia_infer.models.kimi_audio import vocoder
from tests.interpreted import interpreted, needs_triton

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A machine that has everything, whatever this one has."""
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(operators, "python_headers", lambda: tmp_path)
    monkeypatch.setattr(operators, "INTERPRETED", False)
    monkeypatch.delenv("CC", raising=False)
    operators.missing.cache_clear()
    yield
    operators.missing.cache_clear()


def test_cuda_alone_can_use_kernels() -> None:
    assert operators.missing(CUDA) is None
    assert "cpu" in operators.missing(CPU)


def test_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(operators, "INTERPRETED", True)
    assert "package triton" in operators.missing(CUDA)


def test_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "C compiler" in operators.missing(CUDA)


@pytest.mark.parametrize("name", ["gcc", "clang"])
def test_either_compiler_will_do(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(shutil, "which", lambda asked: name if asked == name else None)
    assert operators.missing(CUDA) is None


def test_named_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv("CC", "tcc")
    assert operators.missing(CUDA) is None


def test_headers(tmp_path: Path) -> None:
    (tmp_path / "Python.h").unlink()
    assert "Python.h" in operators.missing(CUDA)


def test_interpreter_runs_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(operators, "INTERPRETED", True)
    assert operators.missing(CPU) is None


def test_answer_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert operators.missing(CUDA) is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: pytest.fail("asked again"))
    assert operators.missing(CUDA) is None


def test_decided_without_importing_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it would fail
    assert operators.missing(CUDA) is None


class Called(TorchDispatchMode):
    """Records the names of this project's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "kimia":
            self.names.append(func.name().removeprefix("kimia::"))
        return func(*args, **(kwargs or {}))


def call_all(device: torch.device, dtype: torch.dtype, leading: tuple[int, ...] = (1, 1)) -> list:
    """Every operator that PyTorch can compute too, with its results."""
    x, weight = torch.ones(*leading, 32, device=device, dtype=dtype), torch.ones(32, device=device)
    weight = weight.to(dtype)
    taps = vocoder.low_pass_filter()
    results = [
        operators.rms_norm(x, weight, 1e-6),
        operators.add_rms_norm(x, x, weight, 1e-6),
        operators.silu_mul(x),
        vocoder.anti_aliased_snake(x, weight[:1], weight[:1], taps),
    ]
    for storage in STORAGES.values():
        matrix = quantize(torch.ones(8, 32, device=device), storage)
        results.append(quantization.matrix_vector(x, *matrix.values(), weight[:8]))
    return results


NAMES = ["rms_norm", "add_rms_norm", "silu_mul", "anti_aliased_snake"] + 3 * ["matrix_vector"]


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_when_operators_are_called(device: torch.device, gradients: bool) -> None:
    """They have no gradient, and the CPU calls PyTorch directly."""
    with FakeTensorMode(), Called() as called, torch.set_grad_enabled(gradients):
        call_all(device, torch.bfloat16)
    assert called.names == (NAMES if device == CUDA and not gradients else [])


def test_without_triton_pytorch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with FakeTensorMode(), Called() as called, torch.no_grad():
        call_all(CUDA, torch.bfloat16)
    assert called.names == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fakes_are_like_the_results(dtype: torch.dtype) -> None:
    """Shape, dtype and strides, against what PyTorch computes."""
    with torch.no_grad():
        real = call_all(CPU, dtype)
        with FakeTensorMode():
            fake = call_all(CUDA, dtype)
    described = [
        [(t.shape, t.dtype, t.stride()) for t in torch.utils._pytree.tree_leaves(results)]
        for results in (real, fake)
    ]
    assert described[0] == described[1]


def check_operators(dtype: torch.dtype) -> None:
    """The checks of torch.library, with interpreted kernels."""
    x, weight = torch.randn(2, 1, 32).to(dtype), torch.randn(32).to(dtype)
    ops, taps = torch.ops.kimia, list(vocoder.low_pass_filter())
    cases = [
        (ops.rms_norm, (x, weight, 1e-6)),
        (ops.add_rms_norm, (x, x.clone(), weight, 1e-6)),
        (ops.silu_mul, (x,)),
        (ops.anti_aliased_snake, (x, weight[:1], weight[:1], taps)),
    ]
    for storage in STORAGES.values():
        matrix = quantize(torch.randn(8, 32), storage)
        cases.append((ops.matrix_vector, (x[:1], *matrix.values(), None)))
    keys, values = torch.zeros(2, 2, 5, 16, dtype=dtype)
    tables = torch.ones(2, 5, 16, dtype=dtype)
    qkv = torch.randn(2, 1, 6 * 16).to(dtype)
    places = torch.tensor([0, 4]), torch.tensor([3, 0])
    cases.append((ops.rotate_append_attend, (qkv, keys, values, *tables, *places, 2, 2)))
    assert attention.rotate_append_attend is ops.rotate_append_attend.default
    with torch.no_grad():
        for op, given in cases:
            narrow = any(isinstance(x, torch.Tensor) and x.dtype.itemsize == 1 for x in given)
            # The check of the schema compares values, which PyTorch does not do for e4m3.
            tests = ("test_faketensor",) if narrow else ("test_schema", "test_faketensor")
            torch.library.opcheck(op, given, test_utils=tests)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_declared_as_they_are(dtype: torch.dtype) -> None:
    interpreted(check_operators, dtype)
