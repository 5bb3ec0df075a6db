"""The velocity network of the flow: noisy mel frames, conditioned on speech codes.

A diffusion transformer (DiT). Every frame is modulated by its speech code and by the time of
the flow (adaLN); frames attend to all frames of their chunk and to cached frames before it.
What depends on codes and times alone is computed once per chunk (:meth:`DiT.condition`), so that a
call of the network is a function of the frames, their conditioning, their rotary angles and the
cache, which :class:`FlowNetwork` can record.
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
from kimia_infer.utils.graphs import Graphs
from kimia_infer.weights.component import Component, Slot, identity_slots
from kimia_infer.weights.tensors import open_model_file

# Sizes are rounded up to multiples of these, so that few graphs serve all chunks.
CODES_STEP = 8
BUCKET_STEP = 256

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

    def condition(self, codes: Tensor, timesteps: Sequence[int]) -> Conditioning:
        """Modulation of the codes int64 [n] at all integer ``timesteps`` of a chunk.

        At full size in bf16 the largest published chunk (42 codes, 30 timesteps) takes 570 MB.
        """
        times = torch.tensor(timesteps).to(self.device)[:, None]
        modulated, final = self.modulation(codes.to(self.device), times)
        shape = (len(timesteps), len(self.blocks), *final.shape[1:2], 6, final.shape[-1])
        blocks = final.new_empty(shape)
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

    def rotary(self, start: int, frames: int) -> Tensor:
        """cos and sin, fp32 [frames, head_dim / 2, 2], of the positions from ``start``."""
        pairs = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=self.device)
        # In this order as published: an ulp of a frequency adds up over long utterances.
        frequencies = 1.0 / self.config.rope_base ** (pairs / self.head_dim)
        positions = torch.arange(start, start + frames, dtype=torch.float32, device=self.device)
        angles = (positions / self.config.rope_interpolation)[:, None] * frequencies
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


class FrameCache:
    """Keys (after rotation) and values of the frames before the current chunk.

    ``keys`` and ``values`` [depth, heads, capacity, head_dim]; the first ``filled`` frames are
    the past. A call of the network writes its own frames behind them, where the next call
    overwrites them, until :meth:`keep` makes them part of the past.
    """

    def __init__(self, dit: DiT, capacity: int):
        config = dit.config
        shape = (config.depth, config.heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, device=dit.device, dtype=dit.dtype)
        self.values = torch.zeros_like(self.keys)
        self.filled = 0

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, layer: int) -> Tensor:
        """Attention of frames that follow the past, each [heads, frames, head_dim]."""
        end = self.filled + keys.shape[1]
        self.keys[layer, :, self.filled : end] = keys
        self.values[layer, :, self.filled : end] = values
        return F.scaled_dot_product_attention(
            query[None], self.keys[layer, None, :, :end], self.values[layer, None, :, :end]
        )[0]

    def keep(self, frames: int, limit: int) -> None:
        """Keep the first ``frames`` of the last call as past; ``limit`` frames in all at most."""
        end = self.filled + frames
        self.filled = min(end, limit)
        if end > limit:
            # Source and target overlap, hence the copy.
            self.keys[:, :, :limit] = self.keys[:, :, end - limit : end].clone()
            self.values[:, :, :limit] = self.values[:, :, end - limit : end].clone()

    def past(self) -> tuple[Tensor, Tensor]:
        """A copy of the past, each [depth, heads, filled, head_dim]."""
        return self.keys[:, :, : self.filled].clone(), self.values[:, :, : self.filled].clone()

    def restore(self, past: tuple[Tensor, Tensor]) -> None:
        """Go back to what :meth:`past` returned."""
        self.filled = past[0].shape[2]
        self.keys[:, :, : self.filled], self.values[:, :, : self.filled] = past


class FlowNetwork:
    """Calls the network for one stream at a time, on top of that stream's ``cache``.

    A call is launched operation by operation, or recorded once for each size and replayed.

    ``past_frames`` and ``chunk_codes`` are the most that the cache keeps and that a chunk has,
    ``frames_per_code`` what a code spans.
    """

    @torch.inference_mode(False)  # so that later streams can write in any mode
    def __init__(
        self, dit: DiT, past_frames: int, chunk_codes: int, frames_per_code: int, graphs: Graphs
    ):
        self.dit, self.graphs = dit, graphs
        self.chunk_codes, self.frames_per_code = chunk_codes, frames_per_code
        frames = chunk_codes * frames_per_code
        self.cache = FrameCache(dit, past_frames + frames)
        if graphs.captures:
            self._inputs = _Inputs(dit, chunk_codes, frames)
            self._recorded: dict[tuple[int, int], Callable[[], None]] = {}

    def velocity(self, x: Tensor, conditioning: StepConditioning, rotary: Tensor) -> Tensor:
        """Velocity [frames, mel_bins] of a chunk x; valid until the next call."""
        if not self.graphs.captures:
            return self.dit(x, conditioning, rotary, self.cache.attend)
        codes = min(_round_up(conditioning.final.shape[0], CODES_STEP), self.chunk_codes)
        end = self.cache.filled + codes * self.frames_per_code
        key = codes, min(_round_up(end, BUCKET_STEP), self.cache.capacity)
        self._inputs.put(x, conditioning, rotary, self.cache.filled)
        if key not in self._recorded:
            self._recorded[key] = self.graphs.record(lambda: self._call(*key))
        self._recorded[key]()
        return self._inputs.velocity[: len(x)]

    def _call(self, codes: int, bucket: int) -> None:
        """Frames beyond those of the chunk are computed too, but nothing sees them."""
        inputs, cache, frames = self._inputs, self.cache, codes * self.frames_per_code
        places = inputs.filled + torch.arange(frames, device=self.dit.device)
        seen = torch.arange(bucket, device=self.dit.device) < inputs.filled + inputs.frames
        mask = seen.expand(1, 1, frames, bucket)

        def attend(query: Tensor, keys: Tensor, values: Tensor, layer: int) -> Tensor:
            cache.keys[layer].index_copy_(1, places, keys)
            cache.values[layer].index_copy_(1, places, values)
            filled = cache.keys[layer, None, :, :bucket], cache.values[layer, None, :, :bucket]
            return F.scaled_dot_product_attention(query[None], *filled, attn_mask=mask)[0]

        conditioning = StepConditioning(inputs.blocks[:, :codes], inputs.final[:codes])
        velocity = self.dit(inputs.x[:frames], conditioning, inputs.rotary[:frames], attend)
        inputs.velocity[:frames] = velocity


class _Inputs:
    """Tensors that recorded calls read and write; as large as the largest chunk."""

    def __init__(self, dit: DiT, codes: int, frames: int):
        config, place = dit.config, {"device": dit.device, "dtype": dit.dtype}
        self.x = torch.zeros(frames, config.mel_bins, **place)
        self.velocity = torch.zeros_like(self.x)
        self.blocks = torch.zeros(config.depth, codes, 6, config.hidden_size, **place)
        self.final = torch.zeros(codes, 2, config.hidden_size, **place)
        self.rotary = torch.zeros(frames, config.head_dim // 2, 2, device=dit.device)
        self.filled = torch.zeros(1, dtype=torch.int64, device=dit.device)
        self.frames = torch.zeros_like(self.filled)

    def put(self, x: Tensor, conditioning: StepConditioning, rotary: Tensor, filled: int) -> None:
        frames, codes = len(x), len(conditioning.final)
        self.x[:frames] = x
        assert isinstance(conditioning.blocks, Tensor)
        self.blocks[:, :codes] = conditioning.blocks
        self.final[:codes] = conditioning.final
        self.rotary[:frames] = rotary
        self.filled.fill_(filled)
        self.frames.fill_(frames)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


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
