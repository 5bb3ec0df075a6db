"""Quantized matrices on a CPU, read as they are stored, by ONNX Runtime's ``MatMulNBits``.

A step of a text reads every matrix once, so on a CPU, too, it takes as long as reading them.
PyTorch has kernels for packed weights, which are slower (``_weight_int4pack_mm_for_cpu``) or only
for bfloat16 (``_weight_int8pack_mm``). This operator has kernels for x86 and Arm. It rounds a row
to 8 bits for each block of ``BLOCK`` values, multiplies in integers and adds the blocks up in
float32, so a result differs from that of the dequantized matrix by the rounding of the row.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from kimia_infer.layers.quantization import GROUP, STORAGES, QuantizedLinear, quantize

if TYPE_CHECKING:
    import onnxruntime

BLOCK = 32
"""Values that share a scale, in a matrix and in what is multiplied with it; the smallest block of
the operator, and the group of int4."""
assert BLOCK == GROUP

PACKED = ("int8", "int4")
"""The schemes whose matrices can be packed."""

ZERO = 128
"""What the operator subtracts from an unsigned value of 8 bits; from one of 4 bits it is 8, as in
the stored format."""

OPSET, IR_VERSION = 17, 10
"""Of the graphs that are built here."""

WORKING_IN_INTEGERS = 4
"""``accuracy_level`` of the operator with which rows are rounded to 8 bits."""


def missing() -> str | None:
    """The package without which nothing can be packed; None if there are all."""
    names = ("onnx", "onnxruntime")
    return next((name for name in names if importlib.util.find_spec(name) is None), None)


def can_pack(layer: nn.Module) -> TypeGuard[QuantizedLinear]:
    """Whether ``layer`` is quantized in a way, and has a size, that the operator knows."""
    if not isinstance(layer, QuantizedLinear) or layer.in_features % BLOCK:
        return False
    return layer.storage.name in PACKED


class PackedLinear(nn.Module):
    """x [..., in] -> [..., out], in the dtype of x: one matrix of a :class:`Matrices`."""

    def __init__(self, matrices: Matrices, name: str, layer: QuantizedLinear):
        super().__init__()
        self.matrices, self.name, self.bias = matrices, name, layer.bias
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bits = _bits(layer)
        # All that is left of the scales: it tells whether a weight was not finite.
        self.largest_scale = nn.Parameter(layer.scale.abs().max(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features).float()
        product = torch.from_numpy(self.matrices.multiply(self.name, rows.numpy()))
        # Rounded to integers, what is not finite may become a number; zero times it is none.
        out = product.add_(0 * rows.sum(1, keepdim=True)).to(x.dtype)
        out = out if self.bias is None else out.add_(self.bias)
        return out.view(*x.shape[:-1], self.out_features)

    @property
    def bytes(self) -> int:
        """Bytes that one product reads: the values and a float32 for each block."""
        values = self.in_features * self.out_features
        return values * self.bits // 8 + 4 * values // BLOCK


class Matrices:
    """Several packed matrices, which share the threads of one session.

    Not to be used by two threads at once.
    """

    def __init__(self, layers: dict[str, QuantizedLinear]):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Its threads wait for the next product by spinning only while one is computed.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.log_severity_level = 3
        self._session: onnxruntime.InferenceSession = onnxruntime.InferenceSession(
            _graph(layers), options, providers=["CPUExecutionProvider"]
        )
        # A run computes every output, so those that are not asked for get no rows.
        self._empty = {
            _input(name): np.empty((0, layer.in_features), np.float32)
            for name, layer in layers.items()
        }

    def multiply(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Float32 [rows, in] times the matrix of that name: [rows, out]."""
        (product,) = self._session.run([name], self._empty | {_input(name): rows})
        assert isinstance(product, np.ndarray)
        return product


def _bits(layer: QuantizedLinear) -> int:
    return 8 // layer.storage.packed


def _input(name: str) -> str:
    return f"{name}.rows"


def _graph(layers: dict[str, QuantizedLinear]) -> bytes:
    """A model with an output for each layer: the product with its matrix."""
    from onnx import TensorProto, helper, numpy_helper

    nodes, values, inputs, outputs = [], [], [], []
    for name, layer in layers.items():
        names = [f"{name}.values", f"{name}.scales"]
        arrays = _packed(layer)
        values += [numpy_helper.from_array(*pair) for pair in zip(arrays, names, strict=True)]
        nodes.append(
            helper.make_node(
                "MatMulNBits",
                [_input(name), *names],
                [name],
                domain="com.microsoft",
                K=layer.in_features,
                N=layer.out_features,
                bits=_bits(layer),
                block_size=BLOCK,
                accuracy_level=WORKING_IN_INTEGERS,
            )
        )
        for port, ports, width in (
            (_input(name), inputs, layer.in_features),
            (name, outputs, layer.out_features),
        ):
            shape = [f"{name}.count", width]
            ports.append(helper.make_tensor_value_info(port, TensorProto.FLOAT, shape))
    graph = helper.make_graph(nodes, "matrices", inputs, outputs, values)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    return model.SerializeToString()


def _packed(layer: QuantizedLinear) -> tuple[np.ndarray, np.ndarray]:
    """Values uint8 [out, blocks, bytes] and scales float32 [out * blocks] for the operator."""
    rows, blocks = layer.out_features, layer.in_features // BLOCK
    weight = layer.weight.view(rows, blocks, -1)
    if _bits(layer) == 4:  # the first half of a block is in the low halves of its bytes
        codes = torch.cat([weight & 15, weight >> 4], dim=2)
        values = codes[..., 0::2] | codes[..., 1::2] << 4
    else:
        values = (weight.to(torch.int16) + ZERO).to(torch.uint8)
    scales = layer.scale.float().expand(rows, blocks).flatten()
    return values.contiguous().numpy(), scales.contiguous().numpy()


@torch.no_grad()
def pack_groups(groups: Iterable[nn.Module]) -> None:
    """Pack all quantized layers below each of ``groups``, in place; a group is a session.

    The memory of their parameters is given back group by group.
    """
    for group in groups:
        layers = {name: layer for name, layer in group.named_modules() if can_pack(layer)}
        if layers:
            matrices = Matrices(layers)
            for name, layer in layers.items():
                group.set_submodule(name, PackedLinear(matrices, name, layer))


@torch.no_grad()
def packed(layer: nn.Module) -> nn.Module:
    """A linear ``layer`` in 8 bits with a scale for each row; itself if its size rules that out."""
    assert isinstance(layer, nn.Linear)
    with torch.device("meta"):
        sizes = layer.in_features, layer.out_features, layer.bias is not None
        new = QuantizedLinear(*sizes, STORAGES["int8"])
    if not can_pack(new):
        return layer
    for leaf, value in quantize(layer.weight, STORAGES["int8"]).items():
        setattr(new, leaf, nn.Parameter(value, requires_grad=False))
    new.bias = layer.bias
    return PackedLinear(Matrices({"product": new}), "product", new)
