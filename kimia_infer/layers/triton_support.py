"""Whether Triton kernels can be used, decided without importing Triton."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

import torch
from torch import Tensor


def fused(x: Tensor) -> bool:
    """Whether single kernels stand for chains of elementwise operations; they have no gradient."""
    return x.device.type != "cpu" and not torch.is_grad_enabled() and available(x.device)


def available(device: torch.device) -> bool:
    """Whether Triton kernels run on tensors of ``device``."""
    return missing(device) is None


@functools.cache
def missing(device: torch.device) -> str | None:
    """What is lacking to run Triton kernels on ``device``, for a log line; None if nothing is.

    With TRITON_INTERPRET=1 in the environment Triton interprets its kernels, on any device.
    """
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return f"Triton kernels are compiled for CUDA devices, not for {device}"
    # Triton builds the launcher of its kernels, a C extension of Python, when one is first used.
    if not os.environ.get("CC") and not shutil.which("gcc") and not shutil.which("clang"):
        return "no C compiler is found (install gcc or name one in CC)"
    if not (_python_headers() / "Python.h").exists():
        return f"Python.h is not in {_python_headers()} (install python3-dev)"
    return None


def _python_headers() -> Path:
    scheme = sysconfig.get_default_scheme()
    # Debian's own scheme points to a directory without headers; Triton avoids it likewise.
    return Path(sysconfig.get_path("include", "posix_prefix" if "local" in scheme else scheme))
