"""Frozen matrices in 4 bits, under adapters that are trained (QLoRA).

The matrices of the trunk and the MIMO branch are quantized while they are read, one at a time.
Embedding, heads, adaptor, norms and Whisper stay as they are: small, or too sensitive.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn

from kimia_infer.training.network import TrainingNetwork
from kimia_infer.utils.errors import ConfigurationError

BLOCK_VALUES = 64
"""Values that share a scale: 4 bits each and 32 bits for the scale are 4.5 bits a value."""

_TYPE = {"quant_type": "nf4", "compress_statistics": False}


class QuantizedLinear(Linear4bit):
    """Replaces ``layer``; has no weight until :meth:`fill`.

    Args:
        layer: on the meta device.
        dtype: of its output.
    """

    def __init__(self, layer: nn.Linear, dtype: torch.dtype):
        sizes = (layer.in_features, layer.out_features, layer.bias is not None)
        super().__init__(*sizes, compute_dtype=dtype, device="meta", **_TYPE)
        # Without values, so that nothing of the size of the matrix is allocated before it is read.
        parameter: Any = Params4bit  # its own arguments are those of __new__
        self.weight = parameter(torch.empty(0, device="meta"), module=self, **_TYPE)
        # A forward pass on the CPU without gradients would pack the weights in another order.
        self.support_avx512bf16_for_cpu = False

    def fill(self, value: Tensor, device: torch.device) -> None:
        """Quantize ``value`` [outputs, inputs] on ``device``."""
        parameter: Any = Params4bit
        weight = parameter(value, blocksize=BLOCK_VALUES, module=self, **_TYPE)
        self.weight = weight.to(device)


def quantize_layers(network: TrainingNetwork) -> dict[str, QuantizedLinear]:
    """Replace the linear layers of the decoder; the new ones by the names of their weights.

    Raises ConfigurationError if rows are
    not whole blocks.
    """
    model, layers = network.language_model, {}
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear) or not name.startswith(("layers.", "mimo_layers.")):
            continue
        if layer.in_features % BLOCK_VALUES:
            raise ConfigurationError(
                f"method: qlora quantizes {BLOCK_VALUES} values of a row together, and {name} has "
                f"rows of {layer.in_features}; use lora"
            )
        quantized = QuantizedLinear(layer, network.dtype)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, quantized)
        layers[f"language_model.{name}.weight"] = quantized
    network.is_loaded_in_4bit = True  # peft reads it  # pyrefly: ignore[bad-argument-type]
    return layers
