"""The tensors of ``speech_tokenizer_v1.onnx`` by the names of s3tokenizer.

The exporter kept the modules' names as those of nodes, and stored matrices transposed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kimia_infer.utils.errors import CheckpointError

CODEBOOK_NODE = "/quantizer/rq/model/layers.0/_codebook/Pow_1"
CODEBOOK = "quantizer._codebook.embed"
POSITIONS = "encoder.positional_embedding"

_LEAVES = {"MatMul": "weight", "Mul": "weight", "Add": "bias", "Add_1": "bias"}


def read_onnx_weights(path: Path) -> dict[str, Tensor]:
    """Raises CheckpointError if the file cannot be read, or the package ``onnx`` is missing."""
    try:
        import onnx
    except ImportError as error:
        raise CheckpointError(
            f"{path}: reading it takes the package onnx: pip install 'kimia-infer[editx]'"
        ) from error
    if not path.is_file():
        raise CheckpointError(f"{path}: file missing")
    try:
        graph = onnx.load(str(path)).graph
    except Exception as error:  # the library raises what its parser raises
        raise CheckpointError(f"{path}: not an ONNX file ({error})") from error
    stored = {each.name: each for each in graph.initializer}
    found = {}
    for node in graph.node:
        for name, source in _parameters(node, stored):
            value = torch.tensor(onnx.numpy_helper.to_array(stored[source]))
            kept = value.dim() != 2 or name == POSITIONS
            found[name] = value if kept else value.T.contiguous()
    return found


def _parameters(node: Any, stored: Any) -> Iterator[tuple[str, str]]:
    """Names of the parameters of a node, and of the initializers that hold them."""
    sources = [name for name in node.input if name in stored]
    *_, leaf = path = node.name.strip("/").split("/")
    if node.name == CODEBOOK_NODE:
        yield CODEBOOK, sources[0]
    elif node.op_type == "LayerNormalization":
        layer = _layer(path[:-1])
        yield from zip((f"{layer}.weight", f"{layer}.bias"), sources, strict=True)
    elif path[0].startswith("blocks.") and leaf in _LEAVES and sources:
        yield f"{_layer(path[:-1])}.{_LEAVES[leaf]}", sources[0]
    else:
        for source in sources:
            if source.startswith(("encoders.conv", "encoders.positional")):
                yield source.replace("encoders.", "encoder.", 1), source


def _layer(path: list[str]) -> str:
    return "encoder." + ".".join(path).replace("mlp.mlp", "mlp")
