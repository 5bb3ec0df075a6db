"""The velocity network of the flow: noisy mel frames, conditioned on speech codes.

A diffusion transformer (DiT). Every frame is modulated by its speech code and by the time of
the flow (adaLN); frames attend to all frames of their chunk and to cached frames before it.
What depends on codes and times alone is computed once per chunk (:meth:`DiT.condition`), so that a
call of the network is a function of the frames, their conditioning, their rotary angles and the
cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from kimia_infer.utils.errors import CheckpointError
from kimia_infer.weights.component import Component, Slot, identity_slots
from kimia_infer.weights.tensors import open_model_file

NORM_EPS = 1e-6  # published implementation
TIMESTEP_FEATURES = 256  # published implementation
TIMESTEP_PERIOD = 10000.0  # published implementation

# Variants that the configuration can name but this architecture does not have.
_REQUIRED_VALUES = {
    "model.dit.position_embedding_type": "skip",
    "model.dit.use_rope": True,
    "model.dit.ffn_type": "vanilla_mlp",
}


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of the network and the statistics of the mel spectrogram.

    ``codes`` is the size of the code book; the embedding has one more row, which training used
    for dropped conditions. A mel value is ``x * mel_std + mel_mean`` with x as the network sees it.
    Positions are divided by ``rope_interpolation``.
    """

    depth: int
    hidden_size: int
    heads: int
    mlp_ratio: float
    mel_bins: int
    codes: int
    rope_base: float
    rope_interpolation: float
    mel_mean: float
    mel_std: float

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads

    @classmethod
    def from_dict(cls, values: dict, source: str = "config.yaml") -> DiTConfig:
        """Build from the published structure; raises CheckpointError naming a bad field."""
        for path, expected in _REQUIRED_VALUES.items():
            found = _lookup(values, path)
            if found != expected:
                raise CheckpointError(
                    f"{source}: {path} = {found!r} is not supported, only {expected!r} is"
                )

        def number(path: str, default: float | None = None) -> Any:
            value = _lookup(values, path)
            value = default if value is None else value
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise CheckpointError(f"{source}: {path} must be a number, found {value!r}")
            return value

        def size(path: str) -> int:
            value = number(path)
            if not isinstance(value, int) or value < 1:
                raise CheckpointError(f"{source}: {path} must be a positive integer, not {value!r}")
            return value

        normalized = _lookup(values, "normalize_mel")
        if not isinstance(normalized, bool):
            raise CheckpointError(
                f"{source}: normalize_mel must be true or false, not {normalized!r}"
            )
        config = cls(
            depth=size("model.dit.depth"),
            hidden_size=size("model.dit.hidden_size"),
            heads=size("model.dit.num_heads"),
            mlp_ratio=number("model.dit.mlp_ratio"),
            mel_bins=size("model.dit.input_size"),
            codes=size("model.dit.semantic_vocab_size"),
            rope_base=number("model.dit.rope_params.rope_base", 10000.0),
            rope_interpolation=number("model.dit.rope_params.rope_interpolation_factor", 1.0),
            mel_mean=number("mel_mean") if normalized else 0.0,
            mel_std=number("mel_std") if normalized else 1.0,
        )
        if config.hidden_size % (2 * config.heads):
            raise CheckpointError(
                f"{source}: model.dit.hidden_size must be an even multiple of model.dit.num_heads"
            )
        return config

    @classmethod
    def from_directory(cls, directory: Path) -> DiTConfig:
        """Read ``config.yaml`` of the checkpoint's ``audio_detokenizer`` folder."""
        path = directory / "config.yaml"
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CheckpointError(f"{path}: file missing") from error
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise CheckpointError(f"{path}: not valid YAML ({error})") from error
        return cls.from_dict(values, str(path))


def _lookup(values: Any, path: str) -> Any:
    """The entry of nested mappings that a dotted path names, or None."""
    for key in path.split("."):
        values = values.get(key) if isinstance(values, dict) else None
    return values


# Queries, keys, values [..., heads, frames, head_dim] of a layer -> the attended values, likewise.
Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]


class StepConditioning(NamedTuple):
    """Modulation of one call.

    blocks [depth, ..., codes, 6, hidden]: shift, scale and gate of the attention, then of the
    feed-forward; final [..., codes, 2, hidden]: shift and scale.
    """

    blocks: Tensor
    final: Tensor


class Conditioning(NamedTuple):
    """Modulation for every timestep of a chunk.

    blocks [timesteps, depth, codes, 6, hidden]: shift, scale and gate of the attention, then
    of the feed-forward; final [timesteps, codes, 2, hidden]: shift and scale.
    """

    blocks: Tensor
    final: Tensor

    def at(self, step: int, codes: int | None = None) -> StepConditioning:
        """Modulation of timestep number ``step``; of the first ``codes`` codes only, if given."""
        return StepConditioning(self.blocks[step, :, :codes], self.final[step, :codes])


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer normalization without own parameters, scaled by 1 + scale and shifted."""
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
        self.config = config
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

    def condition(self, codes: Tensor, timesteps: Sequence[int]) -> Conditioning:
        """Modulation of the codes int64 [n] at all integer ``timesteps`` of a chunk.

        At full size in bf16 the largest published chunk (42 codes, 30 timesteps) takes 570 MB.
        """
        times = torch.tensor(timesteps).to(self.device)[:, None]
        blocks, final = self.modulation(codes.to(self.device), times)
        return Conditioning(blocks.movedim(0, 1), final)

    def modulation(self, codes: Tensor, times: Tensor) -> StepConditioning:
        """Modulation by codes and times of the flow, int64 of shapes that broadcast."""
        condition = self.t_embedder(times) + self.semantic_token_embedding(codes)
        shape, hidden = condition.shape[:-1], self.config.hidden_size
        blocks = condition.new_empty(len(self.blocks), *shape, 6, hidden)
        for index, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            blocks[index] = block.adaLN_modulation(condition).view(*shape, 6, hidden)
        final = self.final_layer.adaLN_modulation(condition).view(*shape, 2, hidden)
        return StepConditioning(blocks, final)

    def rotary(self, start: int, frames: int) -> Tensor:
        """cos and sin, fp32 [frames, head_dim / 2, 2], of the positions from ``start``."""
        pairs = torch.arange(0, self.config.head_dim, 2, dtype=torch.float32, device=self.device)
        # In this order as published: an ulp of a frequency adds up over long utterances.
        frequencies = 1.0 / self.config.rope_base ** (pairs / self.config.head_dim)
        positions = torch.arange(start, start + frames, dtype=torch.float32, device=self.device)
        angles = (positions / self.config.rope_interpolation)[:, None] * frequencies
        return torch.stack([angles.cos(), angles.sin()], dim=-1)

    def forward(
        self, x: Tensor, conditioning: StepConditioning, rotary: Tensor, attend: Attend
    ) -> Tensor:
        """Velocity [..., frames, mel_bins] of the noisy, normalized mel x of the same shape.

        The frames are split evenly over the codes of ``conditioning``; ``attend`` says what
        they see besides themselves.
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


def dit_component(directory: Path) -> Component[DiT]:
    """The network of a checkpoint's ``audio_detokenizer`` folder, published or slim."""
    config = DiTConfig.from_directory(directory)
    return Component(
        name="detokenizer",
        build=lambda: DiT(config),
        slots=dit_slots(config),
        store=open_model_file(directory, "state_dict").under("speech_model.", ""),
        ignored=(),
    )
