"""The flow's network: a diffusion transformer with a causal convolution in every block."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimia_infer.models.step_audio_editx.config import DiTConfig
from kimia_infer.models.step_audio_editx.past import Past

KERNEL = 3
FREQUENCIES, TIMESCALE, TIME_SCALE = 256, 10_000, 1000
NORM_EPS = 1e-6
"""Fixed in the published implementation."""


class Attention(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        inner, self.head_size = config.heads * config.head_size, config.head_size
        self.to_q, self.to_k, self.to_v = (nn.Linear(config.width, inner) for _ in range(3))
        self.q_norm, self.k_norm = (nn.LayerNorm(config.head_size) for _ in range(2))
        self.proj = nn.Linear(inner, config.width)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        query, keys, values = (
            layer(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        keys, values = past.attended(self, self.k_norm(keys), values)
        mixed = F.scaled_dot_product_attention(self.q_norm(query), keys, values)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class ConvBlock(nn.Module):
    """A frame sees those before it. Places in ``block`` are those of the published checkpoint."""

    def __init__(self, width: int):
        super().__init__()
        self.block = nn.ModuleDict(
            {
                "1": nn.Conv1d(width, width, KERNEL),
                "3": nn.LayerNorm(width),
                "6": nn.Conv1d(width, width, KERNEL),
            }
        )

    def forward(self, x: Tensor, past: Past) -> Tensor:
        return self._conv("6", F.mish(self.block["3"](self._conv("1", x, past))), past)

    def _conv(self, place: str, x: Tensor, past: Past) -> Tensor:
        conv = self.block[place]
        return conv(past.before(conv, x.mT, KERNEL - 1)).mT


class FeedForward(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def normalized(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * (1 + scale) + shift


class Block(nn.Module):
    """Attention, convolution and feed-forward, each shifted, scaled and gated by the time."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        width = config.width
        self.attn, self.conv = Attention(config), ConvBlock(width)
        self.mlp = FeedForward(width, int(width * config.mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 9 * width))

    def forward(self, x: Tensor, time: Tensor, past: Past) -> Tensor:
        """x [batch, frames, width], time [batch, 1, width]."""
        given = self.adaLN_modulation(time).chunk(9, dim=-1)
        attend, feed, convolve = given[:3], given[3:6], given[6:]
        x = x + attend[2] * self.attn(normalized(x, *attend[:2]), past)
        x = x + convolve[2] * self.conv(normalized(x, *convolve[:2]), past)
        return x + feed[2] * self.mlp(normalized(x, *feed[:2]))


class FinalLayer(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        width = config.width
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.linear = nn.Linear(width, config.outputs)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.linear(normalized(x, *self.adaLN_modulation(time).chunk(2, dim=-1)))


class TimeEmbedder(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, time: Tensor) -> Tensor:
        """[batch, width] of times [batch] from 0 to 1."""
        half = FREQUENCIES // 2
        rates = torch.exp(-math.log(TIMESCALE) * torch.arange(half, device=time.device) / half)
        angles = (TIME_SCALE * time)[:, None] * rates
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class DiT(nn.Module):
    """Parameters are named as in the published checkpoint."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.t_embedder = TimeEmbedder(config.width)
        self.in_proj = nn.Linear(config.inputs, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)

    def forward(self, x: Tensor, time: Tensor, past: Past) -> Tensor:
        """Velocity [batch, frames, outputs] of x [batch, frames, inputs] at times [batch].

        The inputs are the noisy mel, what it should be, the speaker and the known mel.
        """
        at = self.t_embedder(time)[:, None]
        x = self.in_proj(x)
        for block in self.blocks:
            x = block(x, at, past)
        return self.final_layer(x, at)
