"""Matrices of the decoder in 8 or 4 bits, computed with in the working dtype.

Only weights are quantized: a step at batch 1 takes as long as reading them does. These are the
matrices of trunk and MIMO branch, 81 % of the published weights; embedding, heads, adaptor and
norms keep the working dtype. Scales are rounded to bfloat16 before the values are divided by them:

- ``int8``: round(w / scale), one scale a row, |w| at most 127 * scale;
- ``fp8``: w / scale in e4m3 (3 bits of mantissa), one scale a row, |w| at most 448 * scale;
- ``int4``: 4 bits with a scale for each 32 values of a row, of which the largest is -8 * scale,
  so 4.5 bits a value.

The attention's matrices, an eighth of the weights, are int8 in all three schemes: coarser values
do the most harm there. In fp8 the first layers are int8 too, as their errors spread to all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimia_infer.layers import operators
from kimia_infer.utils.errors import CheckpointError, ConfigurationError
from kimia_infer.weights.component import Component, Slot
from kimia_infer.weights.manifest import MANIFEST_NAME, read_checkpoint_manifest

Model = TypeVar("Model", bound=nn.Module)

SCHEMES = ("none", "fp8", "int8", "int4")
GROUP = 32
"""Values of a row that share a scale in int4; a byte has the i-th and the i+16-th of them."""

FP8 = torch.float8_e4m3fn
FP8_CAPABILITY = (8, 9)
"""The first CUDA devices that compute with e4m3: Ada; then Hopper."""

FIRST_LAYERS = 4
"""Layers of the trunk whose matrices are int8 in the scheme "fp8"."""

MOST_VECTORS = 32
"""Vectors that a kernel multiplies with a matrix as it is stored."""

FORMAT = 1
"""Version of the stored format; increased with every change of it."""

SCALE_DTYPE = torch.bfloat16
BLOCK_VALUES = 2**20  # values that are quantized at once, in float32


def _row_scale(weight: Tensor, largest: float) -> Tensor:
    scale = (weight.abs().amax(1, keepdim=True) / largest).to(SCALE_DTYPE)
    return scale.where(scale != 0, 1)  # a weight that is not finite makes a scale that is not


def _to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = _row_scale(weight, 127)
    return (weight / scale).round().clamp(-127, 127).to(torch.int8), scale


def _to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    largest = torch.finfo(FP8).max
    scale = _row_scale(weight, largest)
    return (weight / scale).clamp(-largest, largest).to(FP8), scale


def _to_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    groups = weight.unflatten(1, (-1, GROUP))
    extreme = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    scale = (extreme / -8).to(SCALE_DTYPE)
    scale = scale.where(scale != 0, 1)
    codes = ((groups / scale).round().clamp(-8, 7) + 8).to(torch.uint8)
    low, high = codes.chunk(2, dim=2)
    return (low | high << 4).flatten(1), scale.squeeze(2)


def _from_bytes(data: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return data.to(dtype).mul_(scale.to(dtype))


def _from_int4(data: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    packed = data.unflatten(1, (-1, GROUP // 2))
    codes = torch.cat([packed & 15, packed >> 4], dim=2).to(dtype)
    return codes.sub_(8).mul_(scale.to(dtype)[:, :, None]).flatten(1)


@dataclass(frozen=True)
class Storage:
    """How a matrix is stored: ``data`` [outputs, inputs / packed] of ``dtype``, and ``scale``.

    ``scale`` is bfloat16 [outputs, inputs / group], [outputs, 1] where ``group`` is None.
    ``quantize`` takes float32 [outputs, inputs]; ``dequantize`` restores it in a given dtype.
    """

    name: str
    dtype: torch.dtype
    packed: int
    group: int | None
    quantize: Callable[[Tensor], tuple[Tensor, Tensor]]
    dequantize: Callable[[Tensor, Tensor, torch.dtype], Tensor]

    def empty(
        self, rows: int, columns: int, device: torch.device | str | None = None
    ) -> dict[str, Tensor]:
        """The two parameters of a matrix [rows, columns], ``weight`` being its data."""
        groups = 1 if self.group is None else columns // self.group
        return {
            "weight": torch.empty(rows, columns // self.packed, dtype=self.dtype, device=device),
            "scale": torch.empty(rows, groups, dtype=SCALE_DTYPE, device=device),
        }


STORAGES = {
    "int8": Storage("int8", torch.int8, 1, None, _to_int8, _from_bytes),
    "fp8": Storage("fp8", FP8, 1, None, _to_fp8, _from_bytes),
    "int4": Storage("int4", torch.uint8, 2, GROUP, _to_int4, _from_int4),
}


def check_quantization(scheme: str, device: torch.device, stored: str = "none") -> None:
    """Raise ConfigurationError, naming what else can be used, unless ``scheme`` runs on ``device``.

    ``stored`` is the scheme of the checkpoint, which leaves no choice unless it is "none".
    """
    if scheme not in SCHEMES:
        raise ConfigurationError(f"quantization: expected {', '.join(SCHEMES)}, found {scheme!r}")
    if scheme == "none" or device.type == "cpu":
        return
    other = ""
    if stored != "none":
        other = "the checkpoint that these weights were made from, with quantization "
    lacking = operators.missing(device)
    if lacking is not None:
        raise ConfigurationError(
            f"quantization: {scheme!r} needs Triton kernels, but {lacking}; use {other}'none'"
        )
    if scheme == "fp8":
        check_fp8("quantization", device, f"{other}'int8' or 'int4'")


def check_fp8(argument: str, device: torch.device, others: str) -> None:
    """Raise ConfigurationError for ``argument``, naming ``others``, on devices that lack e4m3."""
    if device.type == "cpu":
        return
    if device.type != "cuda":
        raise ConfigurationError(
            f"{argument}: 'fp8' needs a CUDA device or the CPU, not {device}; use {others}"
        )
    capability = torch.get_device_module(device).get_device_capability(device)
    if capability < FP8_CAPABILITY:
        raise ConfigurationError(
            f"{argument}: 'fp8' needs compute capability 8.9 (Ada, Hopper) and {device} has "
            f"{'.'.join(map(str, capability))}; use {others}"
        )


def quantize(weight: Tensor, storage: Storage) -> dict[str, Tensor]:
    """``weight`` and ``scale`` of a matrix [outputs, inputs] of any floating dtype."""
    stored = storage.empty(*weight.shape, device=weight.device)
    rows = max(1, BLOCK_VALUES // weight.shape[1])
    for start in range(0, len(weight), rows):
        span = slice(start, start + rows)
        stored["weight"][span], stored["scale"][span] = storage.quantize(weight[span].float())
    return stored


@operators.operator(
    "matrix_vector(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor",
    "quantized_kernels.matrix_vector",
    fake=lambda x, weight, scale, bias: x.new_empty(*x.shape[:-1], len(weight)),
)
def matrix_vector(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """W x + bias [..., rows] of up to MOST_VECTORS vectors x [..., columns]; W is quantized."""
    dequantize = _from_int4 if weight.dtype is torch.uint8 else _from_bytes
    return F.linear(x, dequantize(weight, scale, x.dtype), bias)


class QuantizedLinear(nn.Module):
    """x [..., in] -> [..., out]; a linear layer whose weight is stored as ``storage``.

    The weight is read as stored for a token of each of a few requests, x [rows, 1, in]; for more
    it is dequantized.
    """

    weight: nn.Parameter
    scale: nn.Parameter

    def __init__(self, in_features: int, out_features: int, bias: bool, storage: Storage):
        super().__init__()
        self.in_features, self.out_features, self.storage = in_features, out_features, storage
        for name, value in storage.empty(out_features, in_features).items():
            setattr(self, name, nn.Parameter(value, requires_grad=False))
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in]."""
        return self.storage.dequantize(self.weight, self.scale, dtype)

    def forward(self, x: Tensor) -> Tensor:
        count = x.numel() // self.in_features
        # Kernels for several vectors are compiled for the steps that are recorded, not for the
        # tokens of a prompt, whose number is any.
        if count == 1 or (count <= MOST_VECTORS and x.shape[-2] == 1):
            return matrix_vector(x, self.weight, self.scale, self.bias)
        return F.linear(x, self.dequantized(x.dtype), self.bias)


# Names of the published checkpoints: Kimi-Audio's as loaded here, and those of Llama's layers.
_TRUNKS, _BRANCH = ("layers.", "model.layers."), "mimo_layers."
_ATTENTION, _FEED_FORWARD = (".attention.", ".self_attn."), (".feed_forward.", ".mlp.")
_FIRST_LAYERS = tuple(f"{trunk}{index}." for trunk in _TRUNKS for index in range(FIRST_LAYERS))


def storage_of(scheme: str, layer: str) -> Storage | None:
    """How the weight of the layer of that name is stored; None: in the working dtype."""
    if scheme == "none" or not layer.startswith((*_TRUNKS, _BRANCH)):
        return None
    attention = any(part in layer for part in _ATTENTION)
    if not attention and not any(part in layer for part in _FEED_FORWARD):
        return None
    first = scheme == "fp8" and layer.startswith(_FIRST_LAYERS)
    return STORAGES["int8" if first or attention else scheme]


def quantized_layers(model: nn.Module, scheme: str) -> Iterator[tuple[str, nn.Linear, Storage]]:
    """The linear layers of a language model that ``scheme`` quantizes.

    Raises:
        ConfigurationError: rows are not whole groups.
    """
    for name, layer in list(model.named_modules()):
        storage = storage_of(scheme, name)
        if storage is None or not isinstance(layer, nn.Linear):
            continue
        if storage.group is not None and layer.in_features % storage.group:
            raise ConfigurationError(
                f"quantization: {storage.name} has a scale for each {storage.group} values of a "
                f"row, and {name} has rows of {layer.in_features}; use 'int8' or 'fp8'"
            )
        yield name, layer, storage


@torch.no_grad()
def quantize_model(model: Any, scheme: str, values: bool = True) -> Any:
    """``model`` (a LanguageModel), its matrices quantized in place, one at a time.

    Without ``values``, for a model on the meta device, the new parameters are not filled.
    """
    for name, layer, storage in quantized_layers(model, scheme):
        with torch.device("meta"):
            sizes = layer.in_features, layer.out_features, layer.bias is not None
            new = QuantizedLinear(*sizes, storage)
        if values:
            for leaf, value in quantize(layer.weight, storage).items():
                setattr(new, leaf, nn.Parameter(value, requires_grad=False))
            new.bias = layer.bias
            new.eval()
        model.set_submodule(name, new)
    model.quantization = scheme
    return model


def quantized_component(component: Component, scheme: str) -> Component:
    """A language model that is quantized while it is loaded, one matrix at a time.

    Raises:
        ConfigurationError: rows are not whole groups.
    """
    if scheme == "none":
        return component
    with torch.device("meta"):
        list(quantized_layers(component.build(), scheme))

    def slot_of(slot: Slot) -> Slot:
        storage = _storage_of_slot(slot, scheme)
        if storage is None:
            return slot
        return replace(slot, quantize=partial(quantize, storage=storage))

    slots = [slot_of(slot) for slot in component.slots]
    build = stored_build(component.build, scheme)
    return replace(component, build=build, slots=slots)


def description(scheme: str) -> dict[str, Any] | None:
    """The entry of a checkpoint's manifest that describes ``scheme``; None for "none"."""
    if scheme == "none":
        return None
    details = {"int4": {"group_size": GROUP}, "fp8": {"first_layers_int8": FIRST_LAYERS}}
    return {"scheme": scheme, "format": FORMAT, **details.get(scheme, {})}


def stored_scheme(directory: Path) -> str:
    """How the checkpoint in ``directory`` is quantized, by its manifest; "none" without one.

    Raises:
        CheckpointError: it is quantized in an unknown way.
    """
    path = directory / MANIFEST_NAME
    manifest = read_checkpoint_manifest(path)
    found = None if manifest is None else manifest.quantization
    for scheme in SCHEMES:
        if found == description(scheme):
            return scheme
    raise CheckpointError(
        f"{path}: the weights are quantized as {found}, which this program, of format {FORMAT}, "
        "does not read; prepare them again from the unquantized checkpoint"
    )


def stored_name(name: str, leaf: str) -> str:
    """The stored name of a parameter of the quantized matrix that is published as ``name``."""
    return name if leaf == "weight" else f"{name}_{leaf}"


def stored_slots(slots: Iterable[Slot], scheme: str) -> list[Slot]:
    """The slots of a model whose checkpoint is quantized with ``scheme``."""
    stored = []
    for slot in slots:
        storage = _storage_of_slot(slot, scheme)
        if storage is None:
            stored.append(slot)
            continue
        ((name, shape),) = slot.sources.items()
        layer = slot.parameter.removesuffix(".weight")
        for leaf, value in storage.empty(*shape, device="meta").items():
            sources = {stored_name(name, leaf): tuple(value.shape)}
            stored.append(Slot(f"{layer}.{leaf}", sources, slot.rows, dtype=value.dtype))
    return stored


def stored_build(build: Callable[[], Model], scheme: str) -> Callable[[], Model]:
    """Like ``build``, but for the parameters that :func:`stored_slots` fill."""
    return lambda: quantize_model(build(), scheme, values=False)


def _storage_of_slot(slot: Slot, scheme: str) -> Storage | None:
    layer, _, leaf = slot.parameter.rpartition(".")
    return storage_of(scheme, layer) if leaf == "weight" else None
