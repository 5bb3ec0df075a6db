"""Quantized matrices on a CPU, read as they are stored, by ONNX Runtime's ``MatMulNBits``.

A step of a text reads every matrix once, so on a CPU, too, it takes as long as reading them.
PyTorch has kernels for packed weights, which are slower (``_weight_int4pack_mm_for_cpu``) or only
for bfloat16 (``_weight_int8pack_mm``). This operator has kernels for x86 and Arm. It rounds a row
to 8 bits for each block of values, multiplies in integers and adds the blocks up in float32, so a
result differs from that of the dequantized matrix by the rounding of the row.

Matrices are packed in memory, or mapped from a file that :func:`write_packed` made, which other
processes then share. The order of the values in memory is that of the processor that packed them.
ONNX Runtime packs again when it opens a file, matrix by matrix, and takes the file's instead of its
own if both are equal, so on another processor the result is the same and the memory is not shared.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from kimia_infer.layers.quantization import GROUP, STORAGES, QuantizedLinear, quantize
from kimia_infer.utils.errors import CheckpointError

if TYPE_CHECKING:
    import onnx
    import onnxruntime

log = logging.getLogger(__name__)

BLOCKS = {4: (GROUP,), 8: (4 * GROUP, GROUP)}
"""Values that share a scale, in a matrix of so many bits and in what is multiplied with it; the
first that divides a row. A matrix of 8 bits has a scale for a whole row, which larger blocks repeat
less often: with what stands beside a block, 128 take 8.5 bits a value and 32 take 10."""

PACKED_LAYERS = 4
"""Layers whose packed matrices share threads: 0.7 GB at the published size in int4. What holds them
while they are packed may have 2 GB."""

PACKED = ("int8", "int4")
"""The schemes whose matrices can be packed."""

ZERO = 128
"""What the operator subtracts from an unsigned value of 8 bits; from one of 4 bits it is 8, as in
the stored format."""

MADV_DONTNEED = 4
"""Of Linux's ``madvise``."""

OPSET, IR_VERSION = 17, 10
"""Of the graphs that are built here."""

WORKING_IN_INTEGERS = 4
"""``accuracy_level`` of the operator with which rows are rounded to 8 bits."""


def missing() -> str | None:
    """The package without which nothing can be packed; None if there are all."""
    names = ("onnx", "onnxruntime")
    return next((name for name in names if importlib.util.find_spec(name) is None), None)


def packs(scheme: str, device: torch.device) -> bool:
    """Whether ``scheme`` is packed on ``device``; a warning where a package is missing."""
    if device.type != "cpu" or scheme not in PACKED:
        return False
    lacking = missing()
    if lacking is not None:
        log.warning(
            "Without the package %s, %s saves memory on a CPU and no time; install the extra 'cpu'",
            lacking, scheme,
        )  # fmt: skip
    return lacking is None


def can_pack(layer: nn.Module) -> TypeGuard[QuantizedLinear]:
    """Whether ``layer`` is quantized in a way, and has a size, that the operator knows."""
    if not isinstance(layer, QuantizedLinear) or layer.in_features % GROUP:
        return False
    return layer.storage.name in PACKED


class PackedLinear(nn.Module):
    """x [..., in] -> [..., out], in the dtype of x: one matrix of ``matrices``, below ``name``."""

    def __init__(self, matrices: Matrices, name: str, layer: QuantizedLinear):
        super().__init__()
        self.matrices, self.name, self.bias = matrices, name, layer.bias
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bits, self.block = _bits(layer), _block(layer)
        if not layer.scale.is_meta:
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
        """Bytes that one product reads: the values, and for each block its scale and a float32
        that stands for what is subtracted from the values."""
        return _bytes(self.in_features * self.out_features, self.bits, self.block, floats=2)


class Matrices:
    """Several packed matrices, which share the threads of one session.

    Not to be used by two threads at once. ``file`` is the name of the file to map, "" without one.
    """

    _session: onnxruntime.InferenceSession

    def __init__(self, layers: Mapping[str, QuantizedLinear], file: str = ""):
        self.file = file
        # A run computes every output, so those that are not asked for get no rows.
        self._empty = {
            _input(name): np.empty((0, layer.in_features), np.float32)
            for name, layer in layers.items()
        }

    def pack(self, layers: Mapping[str, QuantizedLinear]) -> None:
        """Pack ``layers`` in memory."""
        self._session = _session(_graph(layers).SerializeToString(), _options())

    def map(self, path: Path) -> None:
        """Use the matrices in a file of :func:`write_packed`.

        Raises:
            CheckpointError: it is no such file.
        """
        options = _options()
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(path.parent)
        )
        try:
            self._session = _session(_read_graph(path), options)
        except Exception as error:  # those of ONNX Runtime have no other base
            raise CheckpointError(
                f"{path}: not a file of packed matrices ({error}); prepare it again"
            ) from error
        _release(path)

    def multiply(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Float32 [rows, in] times the matrix of that name: [rows, out]."""
        (product,) = self._session.run([name], self._empty | {_input(name): rows})
        assert isinstance(product, np.ndarray)
        return product


def write_packed(path: Path, name: str, layers: Mapping[str, QuantizedLinear]) -> None:
    """Write a file of packed matrices to ``path``, to be renamed to ``name`` in any folder.

    What ONNX Runtime maps comes first: every matrix as quantized and as packed. The graph that says
    where they are, and its length in 8 bytes, follow. Memory holds the matrices about three times.

    Raises:
        CheckpointError: a weight is not finite.
    """
    import onnx

    for layer_name, layer in layers.items():
        if not layer.scale.isfinite().all():
            raise CheckpointError(f"{layer_name}: the weights are not all finite numbers")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        unpacked, packed = Path(folder, "unpacked.onnx"), Path(folder, "packed.onnx")
        onnx.save(_graph(layers), unpacked, save_as_external_data=True, location="values")
        options = _options()
        options.optimized_model_filepath = str(packed)
        saving = "session.optimized_model_external_initializers_"
        options.add_session_config_entry(f"{saving}file_name", name)
        options.add_session_config_entry(f"{saving}min_size_in_bytes", "0")
        options.add_session_config_entry(
            "session.save_external_prepacked_constant_initializers", "1"
        )
        _session(str(unpacked), options)
        values, graph = packed.with_name(name), packed.read_bytes()
        with values.open("ab") as file:
            file.write(graph + len(graph).to_bytes(8, "little"))
        values.replace(path)


def file_bytes(layers: Iterable[QuantizedLinear]) -> int:
    """Bytes of a file of :func:`write_packed`, but for the graph and what aligns its parts."""
    return sum(
        _bytes(layer.in_features * layer.out_features, _bits(layer), _block(layer), floats)
        for layer in layers
        for floats in (1, 2)
    )


def _read_graph(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-8, 2)
        length = int.from_bytes(file.read(8), "little")
        file.seek(-8 - length, 2)
        return file.read(length)


def _options() -> onnxruntime.SessionOptions:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads wait for the next product by spinning only while one is computed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    return options


def _session(
    model: bytes | str, options: onnxruntime.SessionOptions
) -> onnxruntime.InferenceSession:
    import onnxruntime

    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _release(path: Path) -> None:
    """Give back the pages of a mapped file that were read to open it.

    They stay in the cache of the system, and those that are used are mapped again. Scales as they
    were before packing are not. Only Linux tells where a file is mapped.
    """
    if sys.platform != "linux":
        return
    advise = ctypes.CDLL(None, use_errno=True).madvise
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, last = line.split(maxsplit=5)
        if last == str(path):
            start, end = (int(part, 16) for part in span.split("-"))
            advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED)


def _bits(layer: QuantizedLinear) -> int:
    return 8 // layer.storage.packed


def _bytes(values: int, bits: int, block: int, floats: int) -> int:
    return values * bits // 8 + 4 * floats * values // block


def _block(layer: QuantizedLinear) -> int:
    return next(size for size in BLOCKS[_bits(layer)] if not layer.in_features % size)


def _input(name: str) -> str:
    return f"{name}.rows"


def _graph(layers: Mapping[str, QuantizedLinear]) -> onnx.ModelProto:
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
                block_size=_block(layer),
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
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)


def _packed(layer: QuantizedLinear) -> tuple[np.ndarray, np.ndarray]:
    """Values uint8 [out, blocks, bytes] and scales float32 [out * blocks] for the operator."""
    rows, blocks = layer.out_features, layer.in_features // _block(layer)
    weight = layer.weight.view(rows, blocks, -1)
    if _bits(layer) == 4:  # the first half of a block is in the low halves of its bytes
        codes = torch.cat([weight & 15, weight >> 4], dim=2)
        values = codes[..., 0::2] | codes[..., 1::2] << 4
    else:
        values = (weight.to(torch.int16) + ZERO).to(torch.uint8)
    scales = layer.scale.float().expand(rows, blocks).flatten()
    return values.contiguous().numpy(), scales.contiguous().numpy()


def packable(group: nn.Module) -> dict[str, QuantizedLinear]:
    """The layers below ``group`` that can be packed, by their names in it."""
    return {name: layer for name, layer in group.named_modules() if can_pack(layer)}


def replace_layers(
    group: nn.Module, layers: Mapping[str, QuantizedLinear], file: str = ""
) -> Matrices:
    """Put a :class:`PackedLinear` in the place of each of ``layers``; its matrices follow."""
    matrices = Matrices(layers, file)
    for name, layer in layers.items():
        group.set_submodule(name, PackedLinear(matrices, name, layer))
    return matrices


def pack_layers(*parts: nn.ModuleList) -> None:
    """:func:`pack_groups` of PACKED_LAYERS each of the layers in ``parts``."""
    pack_groups(
        layers[first : first + PACKED_LAYERS]
        for layers in parts
        for first in range(0, len(layers), PACKED_LAYERS)
    )


@torch.no_grad()
def pack_groups(groups: Iterable[nn.Module]) -> None:
    """Pack all quantized layers below each of ``groups``, in place; a group is a session.

    The memory of their parameters is given back group by group.
    """
    for group in groups:
        if layers := packable(group):
            replace_layers(group, layers).pack(layers)


@torch.no_grad()
def quantized_linear(layer: nn.Module, values: bool = True) -> QuantizedLinear:
    """A linear ``layer`` in 8 bits with a scale for each row; without ``values``, not filled."""
    assert isinstance(layer, nn.Linear)
    with torch.device("meta"):
        sizes = layer.in_features, layer.out_features, layer.bias is not None
        new = QuantizedLinear(*sizes, STORAGES["int8"])
    if values:
        for leaf, value in quantize(layer.weight, STORAGES["int8"]).items():
            setattr(new, leaf, nn.Parameter(value, requires_grad=False))
        new.bias = layer.bias
    return new


def packed(layer: nn.Module) -> nn.Module:
    """A linear ``layer`` in 8 bits, packed in memory; itself if its size rules that out."""
    new = quantized_linear(layer)
    if not can_pack(new):
        return layer
    group = nn.ModuleDict({"product": new})
    pack_groups([group])
    return group["product"]
