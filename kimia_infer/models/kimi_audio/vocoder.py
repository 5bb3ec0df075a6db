"""Mel frames to a wave: a BigVGAN generator with anti-aliased activations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kimia_infer.layers.snake import AntiAliasedSnake
from kimia_infer.utils.errors import CheckpointError
from kimia_infer.weights.component import Component, Slot, read_json
from kimia_infer.weights.tensors import open_model_file

OUTER_KERNEL = 7  # of the first and the last convolution, published implementation

# Variants that the configuration can name but this architecture does not have.
_REQUIRED_VALUES = {
    "resblock": "1",
    "activation": "snakebeta",
    "snake_logscale": True,
    "use_tanh_at_final": False,
    "use_bias_at_final": False,
}


@dataclass(frozen=True)
class VocoderConfig:
    """Sizes of the generator. ``hop_size`` samples of ``sample_rate`` Hz come from each frame.

    Stage i multiplies the rate by ``upsample_rates[i]`` and halves the channels; in each stage
    there is one residual block per entry of ``resblock_kernel_sizes``.
    """

    mel_bins: int
    initial_channels: int
    upsample_rates: tuple[int, ...]
    upsample_kernel_sizes: tuple[int, ...]
    resblock_kernel_sizes: tuple[int, ...]
    resblock_dilation_sizes: tuple[tuple[int, ...], ...]
    sample_rate: int

    @property
    def hop_size(self) -> int:
        return math.prod(self.upsample_rates)

    @classmethod
    def from_dict(cls, values: dict, source: str = "config.json") -> VocoderConfig:
        """Build from published fields; raises CheckpointError naming a bad field."""
        for name, expected in _REQUIRED_VALUES.items():
            if values.get(name) != expected:
                raise CheckpointError(
                    f"{source}: {name} = {values.get(name)!r} is not supported, "
                    f"only {expected!r} is"
                )

        def size(name: str) -> int:
            return _sizes(values.get(name), 0, f"{source}: {name}")

        def sizes(name: str, depth: int = 1) -> tuple:
            return _sizes(values.get(name), depth, f"{source}: {name}")

        config = cls(
            mel_bins=size("num_mels"),
            initial_channels=size("upsample_initial_channel"),
            upsample_rates=sizes("upsample_rates"),
            upsample_kernel_sizes=sizes("upsample_kernel_sizes"),
            resblock_kernel_sizes=sizes("resblock_kernel_sizes"),
            resblock_dilation_sizes=sizes("resblock_dilation_sizes", depth=2),
            sample_rate=size("sampling_rate"),
        )
        config._check(source, size("hop_size"))
        return config

    @classmethod
    def from_directory(cls, directory: Path) -> VocoderConfig:
        """Read ``config.json`` of the checkpoint's ``vocoder`` folder."""
        path = directory / "config.json"
        return cls.from_dict(read_json(path), str(path))

    def _check(self, source: str, hop_size: int) -> None:
        stages = list(zip(self.upsample_rates, self.upsample_kernel_sizes, strict=False))
        rules = {
            "upsample_rates and upsample_kernel_sizes must be equally long": (
                len(self.upsample_rates) == len(self.upsample_kernel_sizes)
            ),
            "each upsample_kernel_sizes entry must exceed its rate by an even number": all(
                kernel >= rate and (kernel - rate) % 2 == 0 for rate, kernel in stages
            ),
            "the product of upsample_rates must be hop_size": self.hop_size == hop_size,
            "upsample_initial_channel must leave a channel when halved once per stage": (
                self.initial_channels >= 2 ** len(self.upsample_rates)
            ),
            "resblock_kernel_sizes and resblock_dilation_sizes must be equally long": (
                len(self.resblock_kernel_sizes) == len(self.resblock_dilation_sizes)
            ),
            "resblock_kernel_sizes must be odd": all(k % 2 for k in self.resblock_kernel_sizes),
        }
        for rule, holds in rules.items():
            if not holds:
                raise CheckpointError(f"{source}: {rule}")


def _sizes(value: Any, depth: int, field: str) -> Any:
    """A positive integer (depth 0) or nested non-empty lists of them, as tuples."""
    if depth == 0 and isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if depth > 0 and isinstance(value, list) and value:
        return tuple(_sizes(item, depth - 1, field) for item in value)
    kind = "a positive integer" if depth == 0 else "a list of sizes"
    raise CheckpointError(f"{field} must be {kind}, found {value!r}")


def _convolution(channels: int, kernel: int, dilation: int = 1) -> nn.Conv1d:
    padding = (kernel - 1) * dilation // 2
    return nn.Conv1d(channels, channels, kernel, padding=padding, dilation=dilation)


class ResidualBlock(nn.Module):
    """For every dilation: activation, dilated convolution, activation, convolution, sum."""

    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...]):
        super().__init__()
        self.convs1 = nn.ModuleList(_convolution(channels, kernel, d) for d in dilations)
        self.convs2 = nn.ModuleList(_convolution(channels, kernel) for _ in dilations)
        self.activations = nn.ModuleList(AntiAliasedSnake(channels) for _ in 2 * dilations)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., channels, time] -> the same shape."""
        before, between = self.activations[::2], self.activations[1::2]
        for first, dilated, second, plain in zip(
            before, self.convs1, between, self.convs2, strict=True
        ):
            x = x + plain(second(dilated(first(x))))
        return x


class Vocoder(nn.Module):
    """The generator; parameters are named as in the published checkpoint, weight norm folded."""

    def __init__(self, config: VocoderConfig):
        super().__init__()
        self.config = config
        channels, padding = config.initial_channels, OUTER_KERNEL // 2
        self.conv_pre = nn.Conv1d(config.mel_bins, channels, OUTER_KERNEL, padding=padding)
        self.ups = nn.ModuleList()
        self.resblocks = nn.ModuleList()
        for rate, kernel in zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True):
            up = nn.ConvTranspose1d(
                channels, channels // 2, kernel, stride=rate, padding=(kernel - rate) // 2
            )
            self.ups.append(nn.Sequential(up))  # stored as ups.<stage>.0
            channels //= 2
            self.resblocks.extend(
                ResidualBlock(channels, size, dilations)
                for size, dilations in zip(
                    config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True
                )
            )
        self.activation_post = AntiAliasedSnake(channels)
        self.conv_post = nn.Conv1d(channels, 1, OUTER_KERNEL, padding=padding, bias=False)

    @property
    def device(self) -> torch.device:
        return self.conv_pre.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_pre.weight.dtype

    def forward(self, mel: Tensor) -> Tensor:
        """Wave [..., hop_size * frames] in -1 .. 1 of a natural-log mel [..., frames, mel_bins]."""
        return self.generate(mel).clamp(-1, 1)

    def generate(self, mel: Tensor) -> Tensor:
        """:meth:`forward` without limits, beyond which a sample would have no gradient."""
        x = self.conv_pre(mel.mT)
        branches = len(self.config.resblock_kernel_sizes)
        for stage, up in enumerate(self.ups):
            x = up(x)
            blocks = self.resblocks[stage * branches : (stage + 1) * branches]
            x = sum(block(x) for block in blocks) / branches
        return self.conv_post(self.activation_post(x)).squeeze(-2)


def fold_weight_norm(g: Tensor, v: Tensor) -> Tensor:
    """The weight of a weight-normalized layer in fp32: v scaled to norm g per first index."""
    v = v.float()
    return v * (g.float() / torch.linalg.vector_norm(v, dim=(1, 2), keepdim=True))


def vocoder_slots(config: VocoderConfig, folded: bool = False) -> list[Slot]:
    """Every learned tensor of the published checkpoint (868 at full size) and its place.

    ``folded`` describes a slim checkpoint instead, in which weight norm is already folded.
    """
    with torch.device("meta"):
        parameters = {n: tuple(p.shape) for n, p in Vocoder(config).named_parameters()}
    slots = []
    for name, shape in parameters.items():
        if name.endswith(".weight") and not folded:
            pair = {f"{name}_g": (shape[0], 1, 1), f"{name}_v": shape}
            slots.append(Slot(name, pair, combine=fold_weight_norm))
        else:
            slots.append(Slot(name, {name: shape}))
    return slots


def vocoder_component(directory: Path) -> Component[Vocoder]:
    """The generator of a checkpoint's ``vocoder`` folder, published or slim.

    The stored filters are computed from their definition and not read.
    """
    config = VocoderConfig.from_directory(directory)
    store = open_model_file(directory, "generator")
    return Component(
        name="vocoder",
        build=lambda: Vocoder(config),
        slots=vocoder_slots(config, folded="conv_pre.weight" in store.tensors),
        store=store,
        ignored=("*.filter",),
    )
