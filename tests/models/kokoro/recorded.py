"""Networks filled with the recorded weights, and those that a recipe makes."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kimia_infer.models.kokoro.checkpoint import slots_of
from kimia_infer.models.kokoro.config import KokoroConfig
from kimia_infer.models.kokoro.layers import AdaIN
from kimia_infer.models.kokoro.network import KokoroNetwork
from kimia_infer.weights.component import Component
from kimia_infer.weights.tensors import TensorStore, open_safetensors
from tests.paths import GOLDEN

RECORDED = GOLDEN / "kokoro"
CPU = torch.device("cpu")

ONES = ("gamma", "norm.weight", "LayerNorm.weight", "layer_norm.weight")


class Unit:
    """A part of the network with its recorded weights, inputs and outputs."""

    def __init__(self, name: str, module: nn.Module):
        stored = open_safetensors([RECORDED / "units_weights.safetensors"])
        tensors = {n: t for n, t in stored.tensors.items() if n.startswith(f"{name}.")}
        store = TensorStore(tensors, stored.location)
        named = nn.ModuleDict({name: module})
        part = Component(name, lambda: named, slots_of(named, store), store, ignored=())
        part.load(CPU, torch.float32)
        self.module: Any = module.eval()
        self._name, self._values = name, load_file(RECORDED / "units.safetensors")

    def __getitem__(self, name: str) -> Tensor:
        return self._values[f"{self._name}.{name}"]


def recipe(name: str, shape: tuple[int, ...]) -> Tensor:
    """The value of a parameter of the recorded whole model; see the README of the recording."""
    size = int(np.prod(shape))
    state = np.random.RandomState(zlib.crc32(name.encode()))
    x = state.standard_normal(size).astype(np.float32).reshape(shape)
    if name.endswith("weight_g") or ".alpha" in name or name.endswith(ONES):
        x = 1 + np.float32(0.1) * x
    elif name.endswith(("bias", "beta")) or ".bias_" in name:
        x = np.float32(0.1) * x
    elif not name.endswith("weight_v"):
        x = (x / np.sqrt(size / shape[0])).astype(np.float32)
    factors = {
        "predictor.duration_proj.linear_layer.weight": 20,
        "predictor.F0_proj.weight": 60,
        "decoder.generator.conv_post.weight_g": 0.1,
    }
    x = x * np.float32(factors.get(name, 1))
    return torch.from_numpy(x + np.float32(100) if name == "predictor.F0_proj.bias" else x)


SYMBOLS = (
    ';:,.!?—…"()“” ̃ʣʥʦʨᵝꭧAIOQSTWYᵊabcdefhijklmnopqrstuvwxyzɑɐɒæβ'
    "ɔɕçɖðʤəɚɛɜɟɡɥɨɪʝɯɰŋɳɲɴøɸθœɹɾɻʁɽʂʃʈʧʊʋʌɣɤχʎʒʔˈˌːʰʲ↓→↗↘ᵻ"
)
"""What Kokoro speaks; in the recorded whole model the numbers of symbols mean nothing."""


def whole_config() -> dict[str, Any]:
    """The configuration of the recorded whole model, as a ``config.json`` has it."""
    recorded = json.loads((RECORDED / "whole.json").read_text())
    vocab = {symbol: place for place, symbol in enumerate(SYMBOLS, 1)}
    return recorded["config"] | {"vocab": vocab}


def write_whole(directory: Path) -> None:
    """A checkpoint directory with the recorded whole model and two voices."""
    config = whole_config()
    (directory / "config.json").write_text(json.dumps(config))
    save_file(whole_tensors(config), directory / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    names = ("af_heart", "am_michael")
    packs = {name: torch.randn(510, 256, generator=generator) for name in names}
    save_file(packs, directory / "voices.safetensors")


def whole_tensors(config: dict[str, Any], affine: bool = True) -> dict[str, Tensor]:
    """Every stored tensor of a network by the recipe, weight norm not folded."""
    shapes = published_shapes(config, affine)
    return {name: recipe(name, shape) for name, shape in shapes.items()}


def published_shapes(config: dict[str, Any], affine: bool = True) -> dict[str, tuple[int, ...]]:
    """The shape of every stored tensor of a network, weight norm not folded."""
    with torch.device("meta"):
        network = KokoroNetwork(KokoroConfig.model_validate(config))
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
    published: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        layer = network.get_submodule(name.rpartition(".")[0])
        plain = "noise_convs" in name or "_proj." in name
        kernels = isinstance(layer, nn.Conv1d | nn.ConvTranspose1d) and not plain
        if name.endswith(".weight") and (kernels or ".conv1x1." in name):
            published[f"{name}_g"] = (shape[0], 1, 1)
            published[f"{name}_v"] = shape if len(shape) == 3 else (*shape, 1)
        else:
            published[name] = shape
    for name, module in network.named_modules():
        if isinstance(module, AdaIN):
            channels = module.fc.out_features // 2
            if affine:
                published |= {f"{name}.norm.weight": (channels,), f"{name}.norm.bias": (channels,)}
            block, _, place = name.rpartition(".")
            if block.endswith(("adain1", "adain2")):
                alpha = f"{block.replace('adain', 'alpha')}.{place}"
                published[alpha] = (1, channels, 1)
    return published


def write_pickle(directory: Path, tensors: dict[str, Tensor], prefix: str = "") -> None:
    """``tensors`` as the published pickle: a dict of sections."""
    sections: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        section, _, rest = name.partition(".")
        sections.setdefault(section, {})[prefix + rest] = tensor
    torch.save(sections, directory / "kokoro-v1_0.pth")


def log_mel(wave: Tensor) -> Tensor:
    """[80, frames], as it was recorded; see the README of the recording."""
    window = torch.hann_window(1024)
    spectrum = torch.stft(wave, 1024, 300, window=window, return_complex=True).abs()
    top = 2595 * np.log10(1 + 12_000 / 700)
    edges = torch.from_numpy(700 * (10 ** (np.linspace(0, top, 82) / 2595) - 1)).float()
    hertz, left, middle, right = torch.linspace(0, 12_000, 513), edges[:-2], edges[1:-1], edges[2:]
    up = (hertz - left[:, None]) / (middle - left)[:, None]
    down = (right[:, None] - hertz) / (right - middle)[:, None]
    return (torch.minimum(up, down).clamp(min=0) @ spectrum).clamp(min=1e-4).log()
