"""The velocity network of the flow: noisy mel frames, conditioned on speech codes.

A diffusion transformer (DiT). Every frame is modulated by its speech code and by the time of
the flow (adaLN); frames attend to all frames of their chunk and to cached frames before it.
What depends on codes and times alone is computed for many times at once (:meth:`DiT.condition`), so
that a call of the network is a function of the frames, their conditioning and their rotary angles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimia_infer.models.kimi_audio.config import DiTConfig
from kimia_infer.models.kimi_audio.packing import mapped_part
from kimia_infer.weights.component import Component, Slot, identity_slots
from kimia_infer.weights.tensors import open_model_file

NORM_EPS = 1e-6  # published implementation
TIMESTEP_FEATURES = 256  # published implementation
TIMESTEP_PERIOD = 10000.0  # published implementation

# Queries, keys, values [..., heads, frames, head_dim] of a layer -> the attended values, likewise.
Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]


class StepConditioning(NamedTuple):
    """Modulation of one call.

    blocks [depth, ..., codes, 6, hidden]: shift, scale and gate of the attention, then of the
    feed-forward; final [..., codes, 2, hidden]: shift and scale.
    """

    blocks: Tensor | Sequence[Tensor]
    final: Tensor


class Conditioning(NamedTuple):
    """Modulation for several timesteps.

    blocks [timesteps, depth, ..., codes, 6, hidden]: shift, scale and gate of the attention, then
    of the feed-forward; final [timesteps, ..., codes, 2, hidden]: shift and scale.
    """

    blocks: Tensor
    final: Tensor

    def at(self, step: int) -> StepConditioning:
        """Modulation of timestep number ``step``."""
        return StepConditioning(self.blocks[step], self.final[step])


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer normalization without parameters, scaled by 1 + scale and shifted."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * (1 + scale) + shift


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotary embedding of x [..., frames, head_dim] in fp32; adjacent elements form pairs."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotary.unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


class TimestepEmbedder(nn.Module):
    """Integer times [...] of the flow (0 .. 1000) -> embeddings [..., hidden_size]."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIMESTEP_FEATURES, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
        )

    def forward(self, times: Tensor) -> Tensor:
        half = TIMESTEP_FEATURES // 2
        exponents = torch.arange(half, dtype=torch.float32, device=times.device) / half
        angles = times[..., None].float() * torch.exp(-math.log(TIMESTEP_PERIOD) * exponents)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        first = self.mlp[0]
        assert isinstance(first, nn.Linear)
        return self.mlp(waves.to(first.weight.dtype))


class Attention(nn.Module):
    """Every frame of the chunk sees the whole chunk and the cached past."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, rotary: Tensor, attend: Attend, layer: int) -> Tensor:
        """x [..., frames, hidden_size] -> the same shape."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-3, -2)
        query, keys = rotate(qkv[:2], rotary)
        mixed = attend(query, keys, qkv[2], layer)
        return self.proj(mixed.transpose(-3, -2).reshape(x.shape))


class FeedForward(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        inner = int(config.hidden_size * config.mlp_ratio)
        self.fc1 = nn.Linear(config.hidden_size, inner)
        self.fc2 = nn.Linear(inner, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Attention and feed-forward, each normalized, modulated and gated by the condition."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.attn = Attention(config)
        self.mlp = FeedForward(config)
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), nn.Linear(config.hidden_size, 6 * config.hidden_size)
        )

    def forward(
        self, x: Tensor, modulation: Tensor, rotary: Tensor, attend: Attend, layer: int
    ) -> Tensor:
        """x [..., codes, frames per code, hidden_size], modulation [..., codes, 6, hidden_size]."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation[..., None, :].unbind(-3)
        inner = modulated_norm(x, shift, scale).flatten(-3, -2)
        x = x + gate * self.attn(inner, rotary, attend, layer).view_as(x)
        return x + gate_mlp * self.mlp(modulated_norm(x, shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        self.linear = nn.Linear(config.hidden_size, config.mel_bins)
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), nn.Linear(config.hidden_size, 2 * config.hidden_size)
        )

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x [..., codes, frames per code, hidden_size], modulation [..., codes, 2, hidden_size]."""
        shift, scale = modulation[..., None, :].unbind(-3)
        return self.linear(modulated_norm(x, shift, scale))


class DiT(nn.Module):
    """The network; parameters are named as in the published checkpoint."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config, self.head_dim = config, config.head_dim
        self.t_embedder = TimestepEmbedder(config.hidden_size)
        self.semantic_token_embedding = nn.Embedding(config.codes + 1, config.hidden_size)
        self.input_linear = nn.Linear(config.mel_bins, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)

    @property
    def device(self) -> torch.device:
        return self.input_linear.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.input_linear.weight.dtype

    def condition(self, codes: Tensor, timesteps: Tensor) -> Conditioning:
        """Modulation of the codes int64 [..., n] at each of the ``timesteps`` int64 [timesteps].

        At full size in bf16, 42 codes at 30 timesteps take 570 MB.
        """
        times = timesteps.view(-1, *[1] * codes.ndim)
        modulated, final = self.modulation(codes, times)
        *places, _, hidden = final.shape
        blocks = final.new_empty(places[0], len(self.blocks), *places[1:], 6, hidden)
        for index, block in enumerate(modulated):
            blocks[:, index] = block
        return Conditioning(blocks, final)

    def modulation(self, codes: Tensor, times: Tensor) -> tuple[Iterator[Tensor], Tensor]:
        """Modulation of every block and of the final layer, as in :class:`StepConditioning`.

        Codes and times of the flow are int64 of shapes that broadcast.
        """
        condition = self.t_embedder(times) + self.semantic_token_embedding(codes)
        layers = (cast(Block, block).adaLN_modulation for block in self.blocks)
        blocks = (layer(condition).unflatten(-1, (6, -1)) for layer in layers)
        return blocks, self.final_layer.adaLN_modulation(condition).unflatten(-1, (2, -1))

    def rotary(self, positions: Tensor) -> Tensor:
        """cos and sin, fp32 [..., head_dim / 2, 2], of integer positions [...]."""
        pairs = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=positions.device)
        # In this order as published: an ulp of a frequency adds up over long utterances.
        frequencies = 1.0 / self.config.rope_base ** (pairs / self.head_dim)
        angles = (positions.float() / self.config.rope_interpolation)[..., None] * frequencies
        return torch.stack([angles.cos(), angles.sin()], dim=-1)

    def forward(
        self, x: Tensor, conditioning: StepConditioning, rotary: Tensor, attend: Attend
    ) -> Tensor:
        """Velocity [..., frames, mel_bins] of the noisy, normalized mel x of the same shape.

        The frames are split evenly over the codes of ``conditioning``; ``attend`` computes
        attention, to the frames before them as well.
        """
        codes = conditioning.final.shape[-3]
        x = self.input_linear(x).unflatten(-2, (codes, -1))
        for index, block in enumerate(self.blocks):
            x = block(x, conditioning.blocks[index], rotary, attend, index)
        return self.final_layer(x, conditioning.final).flatten(-3, -2)


def dit_slots(config: DiTConfig) -> list[Slot]:
    """Every tensor of the published checkpoint (171 at full size) and its place."""
    with torch.device("meta"):
        return identity_slots(DiT(config))


def dit_component(directory: Path, packed: bool = False) -> Component[DiT]:
    """The network of a checkpoint's ``audio_detokenizer`` folder: published, slim or ``packed``."""
    config = DiTConfig.from_directory(directory)
    build, slots = lambda: DiT(config), dit_slots(config)
    if packed:
        build, slots = mapped_part("dit", build, slots)
    return Component(
        name="detokenizer",
        build=build,
        slots=slots,
        store=open_model_file(directory, "state_dict").under("speech_model.", ""),
        ignored=(),
    )
