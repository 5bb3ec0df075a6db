"""What devices compute faster than by PyTorch's plain operations.

Fused operations are operators ``torch.ops.kimia.<name>``: one Triton kernel on CUDA devices,
PyTorch's own operations elsewhere. Each has a fake implementation, so that code runs on fake
tensors, and is traced, without a GPU and without Triton. They have no gradient. On x86 CPUs float32
linear layers are oneDNN's.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import platform
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


# PyTorch gives a float32 ``F.linear`` to MKL, which takes a slow path on AMD processors: on an
# AMD EPYC (Zen 5, two cores) 200 GFLOPS and 15 GB/s of weights, where oneDNN reaches 480 GFLOPS
# and 40 GB/s. An input converted with ``to_mkldnn`` makes the same ``F.linear`` call oneDNN. The
# weight needs no conversion: oneDNN reads an ordinary row-major one, equally fast, so that
# parameters stay as they are and nothing is stored twice.
#
# Both conversions of a call cost about 30 us, as much as reading this many weights. Measured
# with weights that are in no cache: at 512 * 512 a single row takes 0.9 (one thread) to 1.1 (two)
# times as long with MKL, 100 rows 1.7 times; at 512 * 768 1.2 to 1.3 and 1.9; from 512 * 3072 on
# 1.2 to 2.0 and 2.0 to 2.4.
MIN_ELEMENTS = 512 * 512


def has_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` is a CPU with instructions for bfloat16 products, which oneDNN uses.

    Without them convolutions in bfloat16 take many times as long as in float32.
    """
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


class OneDNNLinear(nn.Linear):
    """A linear layer for inference that takes over ``weight`` [out, in] and ``bias`` [out].

    Anything but float32 on the CPU is computed as ``nn.Linear`` does, so that the layer may be
    moved and cast like one.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        out_features, in_features = weight.shape
        super().__init__(in_features, out_features, bias=bias is not None, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """input [..., in] -> [..., out]."""
        x = input
        if not all(t.is_cpu and t.dtype is torch.float32 for t in (x, self.weight)):
            return super().forward(x)
        rows = x.reshape(-1, self.in_features)  # oneDNN takes at most five dimensions
        out = F.linear(rows.to_mkldnn(), self.weight, self.bias).to_dense()
        return out.view(*x.shape[:-1], self.out_features)


def use_onednn(module: nn.Module, min_elements: int = MIN_ELEMENTS) -> None:
    """Replace the ``nn.Linear`` layers below ``module`` that oneDNN computes faster.

    These are the float32 ones on an x86 CPU with at least ``min_elements`` weights. Parameters
    keep their names and their memory.
    """
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    if not x86 or not torch.backends.mkldnn.is_available():
        return
    for parent in list(module.modules()):
        for name, layer in parent.named_children():
            if type(layer) is nn.Linear and _gains(layer.weight, min_elements):
                setattr(parent, name, OneDNNLinear(layer.weight, layer.bias))


def _gains(weight: Tensor, min_elements: int) -> bool:
    return weight.is_cpu and weight.dtype is torch.float32 and weight.numel() >= min_elements
