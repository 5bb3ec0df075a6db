"""Fused operations: one Triton kernel on CUDA devices, PyTorch's own operations elsewhere.

Each is an operator ``torch.ops.kimia.<name>`` with a fake implementation, so that code runs on fake
tensors, and is traced, without a GPU and without Triton. They have no gradient.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# With TRITON_INTERPRET=1 in the environment Triton interprets its kernels, on any device.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_library = torch.library.Library("kimia", "DEF")


@functools.cache
def missing(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on ``device``, for a log line; None if they can.

    Decided without importing Triton.
    """
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if INTERPRETED:
        return None
    if device.type != "cuda":
        return f"Triton kernels are compiled for CUDA devices, not for {device}"
    # Triton builds the launcher of its kernels, a C extension of Python, when one is first used.
    if not os.environ.get("CC") and not shutil.which("gcc") and not shutil.which("clang"):
        return "no C compiler is found (install gcc or name one in CC)"
    if not (python_headers() / "Python.h").exists():
        return f"Python.h is not in {python_headers()} (install python3-dev)"
    return None


def python_headers() -> Path:
    """Where Triton looks for Python.h."""
    scheme = sysconfig.get_default_scheme()
    # Debian's own scheme points to a directory without headers; Triton avoids it likewise.
    return Path(sysconfig.get_path("include", "posix_prefix" if "local" in scheme else scheme))


def kernel_operator(schema: str, kernel: str, fake: Callable) -> Any:
    """An operator that only Triton computes; ``schema`` is its name and signature.

    ``kernel`` is the module of this package and the function in it that launch the kernel, and
    ``fake`` gives empty tensors of the shape and dtype of the result.
    """
    name = schema.partition("(")[0]

    def launch(*given: Any) -> Any:
        return _kernel(kernel)(*given)

    _library.define(schema)
    for key in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
        _library.impl(name, launch, key)
    torch.library.register_fake(f"kimia::{name}", fake, lib=_library)
    return getattr(torch.ops.kimia, name).default


def operator(schema: str, kernel: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Make a function an operator: it is what other devices, and those without Triton, compute.

    The arguments are those of :func:`kernel_operator`. What the function is replaced with calls it
    directly on the CPU, where the dispatcher takes about as long as the operation, and with
    gradients enabled, which the operator does not have.
    """

    def register(eager: Callable) -> Callable:
        call = kernel_operator(schema, kernel, fake)
        _library.impl(call.name().removeprefix("kimia::"), eager, "CompositeExplicitAutograd")

        @functools.wraps(eager)
        def choose(x: Tensor, *rest: Any) -> Any:
            if torch.is_grad_enabled() or missing(x.device):
                return eager(x, *rest)
            return call(x, *rest)

        return choose

    return register


@functools.cache
def _kernel(path: str) -> Callable:
    module, _, function = path.rpartition(".")
    return getattr(importlib.import_module(f"kimia_infer.layers.{module}"), function)


@operator(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    "attention_kernels.rms_norm",
    fake=lambda x, weight, eps: torch.empty_like(x, memory_format=torch.contiguous_format),
)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., size] / rms(x) * weight [size], accumulated in fp32 and rounded once."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


@operator(
    "add_rms_norm(Tensor x, Tensor delta, Tensor weight, float eps) -> (Tensor, Tensor)",
    "attention_kernels.add_rms_norm",
    fake=lambda x, delta, weight, eps: (x.new_empty(x.shape), x.new_empty(x.shape)),
)
def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + delta, both [..., size], rounded to their dtype, and its :func:`rms_norm`."""
    total = x + delta
    return total, F.rms_norm(total, (total.shape[-1],), weight, eps)


@operator(
    "silu_mul(Tensor gate_up) -> Tensor",
    "attention_kernels.silu_mul",
    fake=lambda gate_up: gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2),
)
def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, both rounded, of the joined projection [..., 2 * inner]: [..., inner]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
