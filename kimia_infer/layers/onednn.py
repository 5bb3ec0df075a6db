"""What oneDNN computes faster on CPUs: float32 linear layers on x86, and bfloat16 where it can.

PyTorch gives a float32 ``F.linear`` to MKL, which takes a slow path on AMD processors: on an
AMD EPYC (Zen 5, two cores) 200 GFLOPS and 15 GB/s of weights, where oneDNN reaches 480 GFLOPS
and 40 GB/s. An input converted with ``to_mkldnn`` makes the same ``F.linear`` call oneDNN. The
weight needs no conversion: oneDNN reads an ordinary row-major one, equally fast, so that
parameters stay as they are and nothing is stored twice.
"""

from __future__ import annotations

import platform

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
