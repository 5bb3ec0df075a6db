"""Triton kernels without a GPU: interpreted on CPU tensors, and compiled but not run.

Triton reads TRITON_INTERPRET when it is imported, so interpreted functions run in one worker
process with that variable set, and nothing else is affected.
"""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not available on this platform"
)

Launch = tuple[Any, dict[str, Any]]  # a kernel and its arguments by name


def interpreted(function: Callable, *args: Any) -> Any:
    """The result of a module's function in the process whose kernels are interpreted.

    ``function``, ``args`` and the result are pickled; exceptions are raised here.
    """
    return _worker().submit(function, *args).result()


@functools.cache
def _worker() -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=context, initializer=_prepare)


def _prepare() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    torch.set_num_threads(1)
    mend_interpreter()


def mend_interpreter() -> None:
    """Make Triton's interpreter compute what compiled kernels do.

    It cuts numbers off to bf16 and e4m3, where they round to the nearest value, ties to even, and
    multiplies matrices of bf16 as if their bits were integers. That of Triton 3.6 also fails to
    count loops with the NumPy of requirements.txt.
    """
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float
    builder = type(interpreter.interpreter_builder)
    dot = builder.create_dot
    patch_tensor = interpreter._patch_lang_tensor

    def convert_float(values, source, target, rounding):
        if (source, target) == (tl.float32, tl.float8e4nv):
            wide = torch.from_numpy(np.ascontiguousarray(values))
            return wide.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, rounding)
        bits = np.ascontiguousarray(values).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)

    def widened(matrix):
        if matrix.dtype.scalar != tl.bfloat16:
            return matrix
        wide = (matrix.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(wide, tl.float32)

    def patch_tensor_and_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_tensor_and_index
    interpreter._convert_float = convert_float
    builder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)


def recorded_launches(monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any]) -> list[Launch]:
    """The kernels that ``work`` would launch; its tensors may be on any device."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    def record(self, *args, grid, warmup, **options):
        named = dict(zip(self.arg_names, args, strict=False))
        launches.append((self, named | options))

    monkeypatch.setattr(JITFunction, "run", record)
    work()
    monkeypatch.undo()
    return launches


def compiled(launch: Launch, capability: int) -> Any:
    """The kernel of a launch, compiled for CUDA's sm_``capability`` as its arguments ask."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, given = launch[0], dict(launch[1])
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = given.pop(name)
        signature[name] = kind = _kind(value, kernel.params[index].is_constexpr)
        if kind == "constexpr":
            constants[(index,)] = value
        elif kind != "fp32" and _address_or_value(value) % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=given)


def _kind(value: Any, is_constexpr: bool) -> str:
    """As Triton's launcher tells arguments apart: an integer 1 becomes a constant."""
    names = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "int64": "*i64"}
    names |= {"int8": "*i8", "uint8": "*u8", "float8_e4m3fn": "*fp8e4nv"}
    if is_constexpr or value is None or (type(value) is int and value == 1):
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return names[str(value.dtype).removeprefix("torch.")]


def _address_or_value(value: Any) -> int:
    return value if isinstance(value, int) else value.data_ptr()
