"""The weights in the int8 ONNX export of Kokoro, as float32 under their published names.

The exporter quantized matrices by column and convolutions by tensor, folded weight norm, and kept
the modules' names as those of nodes. ONNX has the ``onnx`` package for reading, which is imported
only here: what serves does not need it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kimia_infer.utils.errors import WeightsError

_PREDICTOR = re.compile(r"^(shared|[FN0]+_proj|[FN]0?\.\d)")
_QUANTIZED = {"MatMulInteger", "ConvInteger"}
_REPEATED = re.compile(r"_\d+$")
"""Marks further uses of the one layer of ALBERT."""

_KEPT = re.compile(r"\.(bias|weight|gamma|beta|alpha\d\.\d)$")
_COMPUTED = re.compile(r"\bi?stft\b")  # modules whose tensors are no parameters

GATES = (0, 2, 3, 1)
"""Where PyTorch's gates (input, forget, cell, output) are among those of ONNX (i, o, f, c)."""


def read_onnx_weights(path: Path) -> dict[str, Tensor]:
    """Every parameter of the network that the export has, weight norm folded.

    Raises:
        WeightsError: the ``onnx`` package is missing, or the file is not this export.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise WeightsError(
            "reading the packaged weights takes the package onnx: pip install 'kimia-infer[kokoro]'"
        ) from error
    graph = onnx.load(str(path)).graph
    stored = {each.name: each for each in graph.initializer}

    def value(name: str) -> Tensor:
        return torch.from_numpy(np.array(numpy_helper.to_array(stored[name])))

    try:
        return dict(_parameters(graph, stored, value))
    except (KeyError, IndexError, RuntimeError) as error:
        raise WeightsError(f"{path}: not the int8 export of Kokoro ({error})") from error


def _parameters(graph: Any, stored: Any, value: Any) -> Iterator[tuple[str, Tensor]]:
    by_name = {node.name: node for node in graph.node}
    for name in stored:
        known = re.fullmatch(r"(?:encoder|decoder)\.(.+)", name)
        if known and _KEPT.search(name) and not _COMPUTED.search(name):
            yield known[1], value(name)
    for node in graph.node:
        if node.op_type in _QUANTIZED and not _REPEATED.search(_module(node.name)):
            scale = value(node.input[1].removesuffix("_quantized") + "_scale")
            weight = _dequantized(value(node.input[1]), scale, value(node.input[3]))
            matrix = node.op_type == "MatMulInteger"
            yield f"{_module(node.name)}.weight", weight.T.contiguous() if matrix else weight
        elif node.op_type == "Gather" and node.name.endswith("_quant"):
            linear = by_name[f"{node.name}_DequantizeLinear"]
            scale, zero = value(linear.input[1]), value(linear.input[2])
            yield f"{_module(node.name)}.weight", _dequantized(value(node.input[0]), scale, zero)
        elif node.op_type == "DynamicQuantizeLSTM":
            inputs = [value(i) if i in stored else None for i in node.input]
            yield from _lstm(_module(node.name), inputs)
        elif node.op_type in ("Conv", "ConvTranspose") and not _COMPUTED.search(node.name):
            yield f"{_module(node.name)}.weight", value(node.input[1])
        elif node.op_type == "MatMul" and node.input[1] in stored:
            yield f"{_module(node.name)}.weight", value(node.input[1]).T.contiguous()


def _dequantized(weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (weight.float() - zero.float()) * scale


def _lstm(module: str, inputs: list[Any]) -> Iterator[tuple[str, Tensor]]:
    """Both directions; inputs are those of the operator: X, W, R, B, ..., scales at 8 and 10."""
    for direction, suffix in enumerate(("", "_reverse")):
        for kind, place, scales in (("ih", 1, 8), ("hh", 2, 10)):
            weight, scale, zero = (inputs[i][direction] for i in (place, scales, scales + 1))
            each = _dequantized(weight, scale, zero)
            yield f"{module}.weight_{kind}_l0{suffix}", _reordered(each.T)
        for kind, bias in zip(("ih", "hh"), inputs[3][direction].chunk(2), strict=True):
            yield f"{module}.bias_{kind}_l0{suffix}", _reordered(bias)


def _reordered(gates: Tensor) -> Tensor:
    parts = gates.chunk(4)
    return torch.cat([parts[place] for place in GATES])


def _module(node: str) -> str:
    """The module of a node, such as ``/encoder/F0.0/conv1/Conv_quant``: predictor.F0.0.conv1."""
    _, _, *scopes, _ = node.split("/")
    names: list[str] = []
    for scope in scopes:
        if names and scope.startswith(f"{names[-1]}."):
            names.pop()
        names.append(scope)
    name = ".".join(names)
    return f"predictor.{name}" if _PREDICTOR.match(name) else name
