"""The network of a checkpoint directory, loaded strictly.

It is ``kokoro-v1_0.pth`` as on the hub or a ``model.safetensors``, in which the published names
have their section in front (``decoder.encode.conv1.bias``). Weight norm may be folded (``.weight``
instead of ``.weight_g`` and ``.weight_v``).
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from kimia_infer.layers.operators import use_onednn
from kimia_infer.models.kokoro.adapters.store import apply_adapter, find_adapter
from kimia_infer.models.kokoro.config import KokoroConfig
from kimia_infer.models.kokoro.fourier import use_fourier
from kimia_infer.models.kokoro.layers import AdaIN, AdaLayerNorm
from kimia_infer.models.kokoro.layout import FETCH, PICKLE_NAME, TENSORS_NAME
from kimia_infer.models.kokoro.network import KokoroNetwork
from kimia_infer.utils.errors import CheckpointError
from kimia_infer.weights.component import Component, Slot, fold_weight_norm
from kimia_infer.weights.tensors import TensorStore, open_pickle, open_safetensors

SECTIONS = ("bert", "bert_encoder", "predictor", "text_encoder", "decoder")

UNUSED = ("bert.pooler.*", "bert.embeddings.position_ids")

_PARAMETRIZED = re.compile(r"\.parametrizations\.weight\.original([01])$")
_SNAKE = re.compile(r"(.+)\.(adain|convs)([12])\.(\d+)\.(.+)")


def load_network(
    directory: Path,
    device: torch.device,
    decoder_dtype: torch.dtype = torch.float32,
    adapter: str | None = None,
) -> KokoroNetwork:
    """The network of a directory, for inference; its decoder has ``decoder_dtype``.

    ``adapter`` is put into it: the name of one in ``adapters`` of the directory, or another
    directory.

    Raises:
        CheckpointError: a file is missing or damaged, a tensor is missing, has another shape,
            or has no place in the network, or the adapter is not there or does not fit.
    """
    network = network_component(directory).load(device, torch.float32)
    if adapter is not None:
        apply_adapter(network.predictor, find_adapter(directory, adapter))
    network.decoder.to(decoder_dtype)
    use_fourier(network.decoder)
    use_onednn(network)
    return network


def network_component(directory: Path) -> Component[KokoroNetwork]:
    """The network with the tensors it is filled from, all names and shapes checked."""
    config = KokoroConfig.from_directory(directory)
    store = open_network(directory)
    with torch.device("meta"):
        network = KokoroNetwork(config)
    return Component(
        name="Kokoro network",
        build=lambda: KokoroNetwork(config),
        slots=slots_of(network, store),
        store=store,
        ignored=UNUSED,
    )


def open_network(directory: Path) -> TensorStore:
    """The stored tensors of a directory by their published names, ``section.name``."""
    path = directory / TENSORS_NAME
    if path.is_file():
        return canonical(open_safetensors([path]))
    path = directory / PICKLE_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{directory}: neither {PICKLE_NAME} nor {TENSORS_NAME} is there; {FETCH}"
        )
    tensors = {}
    for section in SECTIONS:
        for name, tensor in open_pickle(path, section).tensors.items():
            tensors[f"{section}.{name.removeprefix('module.')}"] = tensor
    return canonical(TensorStore(tensors, path))


def canonical(store: TensorStore) -> TensorStore:
    """The same tensors, with one form of the names of weight norm: weight_g and weight_v."""

    def name_of(name: str) -> str:
        return _PARAMETRIZED.sub(lambda m: f".weight_{'gv'[int(m[1])]}", name)

    return TensorStore({name_of(n): t for n, t in store.tensors.items()}, store.location)


def slots_of(network: nn.Module, store: TensorStore) -> list[Slot]:
    """Every parameter of ``network``, or of a part of it, and what it is made from."""
    styled = {n: m for n, m in network.named_modules() if isinstance(m, AdaIN | AdaLayerNorm)}
    return [
        _style_slot(name, parameter, store)
        if name.rpartition(".fc.")[0] in styled
        else _slot(name, parameter, store)
        for name, parameter in network.named_parameters()
    ]


def _slot(name: str, parameter: Tensor, store: TensorStore) -> Slot:
    """A weight, its norm folded, the frequency of a snake before it divided out."""
    shape = tuple(parameter.shape)
    published = (*shape, 1) if name.endswith(".conv1x1.weight") else shape
    layer = name.removesuffix(".weight")
    sources: dict[str, tuple[int, ...]] = {name: published}
    folds = layer != name and f"{layer}.weight_v" in store.tensors
    if folds:
        sources = {f"{layer}.weight_g": (shape[0], 1, 1), f"{layer}.weight_v": published}
    found = _SNAKE.fullmatch(name)
    snake = found is not None and found[2] == "convs" and found[5] == "weight"
    if found is not None and snake:
        sources[_frequency(found)] = (1, shape[1], 1)
    if not folds and not snake and published == shape:
        return Slot(name, sources)

    def combine(*stored: Tensor) -> Tensor:
        weight = fold_weight_norm(stored[0], stored[1]) if folds else stored[0]
        return (weight / stored[-1] if snake else weight).view(shape)

    return Slot(name, sources, combine=combine)


def _style_slot(name: str, parameter: Tensor, store: TensorStore) -> Slot:
    """A ``fc`` that gives scale and shift as they are applied.

    Published: (1 + g) (w y + b) + h of the normalized y, where g and h come from ``fc`` and the
    affine w and b of the norm are stored only by some writers (and are 1 and 0 in the released
    model). A snake behind it multiplies both by its frequency.
    """
    layer, _, kind = name.rpartition(".")
    channels = len(parameter) // 2
    weight, bias = f"{layer}.weight", f"{layer}.bias"
    sources = {weight: (2 * channels, *_inputs(parameter, store, weight)), bias: (2 * channels,)}
    norm = f"{layer.removesuffix('.fc')}.norm"
    affine = f"{norm}.weight" in store.tensors
    if affine:
        sources |= {f"{norm}.weight": (channels,), f"{norm}.bias": (channels,)}
    found = _SNAKE.fullmatch(name)
    if found is not None:
        sources[_frequency(found)] = (1, channels, 1)

    def combine(weight: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
        one = torch.ones(channels)
        w, b = rest[:2] if affine else (one, 0 * one)
        a = rest[-1].view(channels) if found is not None else one
        joined = torch.cat([weight, bias[:, None]], dim=1)
        g, h = joined.chunk(2)
        g = torch.cat([g[:, :-1], g[:, -1:] + 1], dim=1)
        scale, shift = a[:, None] * w[:, None] * g, a[:, None] * (h + b[:, None] * g)
        both = torch.cat([scale, shift])
        return both[:, :-1] if kind == "weight" else both[:, -1]

    return Slot(name, sources, combine=combine)


def _inputs(parameter: Tensor, store: TensorStore, weight: str) -> tuple[int, ...]:
    """Width of the style, which the bias does not tell."""
    if parameter.dim() == 2:
        return (parameter.shape[1],)
    stored = store.tensors.get(weight)
    return () if stored is None else stored.shape[1:]


def _frequency(found: re.Match[str]) -> str:
    """The name of the frequency of the snake that belongs to a matched layer."""
    return f"{found[1]}.alpha{found[3]}.{found[4]}"
