"""The flow's encoder: rows of codes to what each of two frames should sound like."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimia_infer.models.step_audio_editx.config import EncoderConfig
from kimia_infer.models.step_audio_editx.past import Past

NORM_EPS = 1e-12  # of the blocks, published implementation
TIMESCALE = 10_000


class RelativeAttention(nn.Module):
    """Attention with scores of the distance, as in Transformer-XL."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.linear_q, self.linear_k, self.linear_v, self.linear_out = (
            nn.Linear(width, width) for _ in range(4)
        )
        self.linear_pos = nn.Linear(width, width, bias=False)
        self.pos_bias_u = nn.Parameter(torch.empty(heads, width // heads))
        self.pos_bias_v = nn.Parameter(torch.empty(heads, width // heads))

    def forward(self, x: Tensor, distances: Tensor, past: Past) -> Tensor:
        """x [batch, time, width], distances [time + keys - 1, width] -> like x."""
        heads, size = self.pos_bias_u.shape

        def split(y: Tensor) -> Tensor:
            return y.unflatten(-1, (heads, size)).transpose(-3, -2)

        query, keys, values = (
            split(layer(x)) for layer in (self.linear_q, self.linear_k, self.linear_v)
        )
        keys, values = past.attended(self, keys, values)
        scores = (query + self.pos_bias_v[:, None]) @ split(self.linear_pos(distances)).mT
        mixed = F.scaled_dot_product_attention(
            query + self.pos_bias_u[:, None], keys, values, attn_mask=aligned(scores) * size**-0.5
        )
        return self.linear_out(mixed.transpose(1, 2).flatten(2))


def aligned(scores: Tensor) -> Tensor:
    """[..., time, keys] of scores [..., time, time + keys - 1] by distance, the largest first.

    The last key is that of the last time.
    """
    time, distances = scores.shape[-2:]
    shifted = F.pad(scores, (1, 0)).flatten(-2)[..., time:]
    return shifted.unflatten(-1, (time, -1))[..., : distances + 1 - time]


def distance_table(time: int, keys: int, width: int, device: torch.device) -> Tensor:
    """Sinusoids float32 [time + keys - 1, width] of the distances keys - 1 .. 1 - time."""
    steps = torch.arange(0, width, 2, dtype=torch.float32, device=device)
    rates = torch.exp(steps * -(math.log(TIMESCALE) / width))
    distances = torch.arange(keys - 1, -time, -1, dtype=torch.float32, device=device)
    angles = distances[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


class FeedForward(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.w_1, self.w_2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(F.silu(self.w_1(x)))


class Block(nn.Module):
    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.self_attn = RelativeAttention(config.width, config.heads)
        self.feed_forward = FeedForward(config.width, config.inner)
        self.norm_ff = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.norm_mha = nn.LayerNorm(config.width, eps=NORM_EPS)

    def forward(self, x: Tensor, distances: Tensor, past: Past) -> Tensor:
        x = x + self.self_attn(self.norm_mha(x), distances, past)
        return x + self.feed_forward(self.norm_ff(x))


class Embed(nn.Module):
    """A linear layer, a norm, and the scale of the published positions."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.out = nn.Sequential(nn.Linear(inputs, width), nn.LayerNorm(width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.out(x)
        return out * math.sqrt(out.shape[-1])


class LookAhead(nn.Module):
    """Adds convolutions over the next rows, then over the two before."""

    def __init__(self, width: int, ahead: int):
        super().__init__()
        self.conv1 = nn.Conv1d(width, width, ahead + 1)
        self.conv2 = nn.Conv1d(width, width, 3)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        """x [batch, rows, width]; those ahead are left out, and zero behind the last chunk."""
        ahead = self.conv1.kernel_size[0] - 1
        seen = F.pad(x.mT, (0, ahead)) if past.last else x.mT
        y = past.before(self.conv2, F.leaky_relu(self.conv1(seen)), 2)
        y = self.conv2(y).mT
        return x[:, : y.shape[1]] + y


class Upsample(nn.Module):
    """Two frames for every row, smoothed over the frames before."""

    def __init__(self, width: int, rate: int):
        super().__init__()
        self.rate = rate
        self.conv = nn.Conv1d(width, width, 2 * rate + 1)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        repeated = x.repeat_interleave(self.rate, dim=1).mT
        return self.conv(past.before(self.conv, repeated, 2 * self.rate)).mT


class Encoder(nn.Module):
    """Parameters are named as in the published checkpoint."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        width = config.width
        self.embed = Embed(config.inputs, width)
        self.pre_lookahead_layer = LookAhead(width, config.ahead)
        self.encoders = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.up_layer = Upsample(width, config.rate)
        self.up_embed = Embed(config.inputs, width)
        self.up_encoders = nn.ModuleList(Block(config) for _ in range(config.up_blocks))
        self.after_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, past: Past, before: int = 0) -> Tensor:
        """x [batch, rows, inputs] -> [batch, rate * rows, width].

        Of a chunk that is not the last one, the rows of the look-ahead give nothing yet.
        ``before`` are the rows of chunks before.
        """
        x = self.pre_lookahead_layer(self.embed(x), past)
        x = self._blocks(self.encoders, x, past, before)
        x = self.up_embed(self.up_layer(x, past))
        x = self._blocks(self.up_encoders, x, past, self.up_layer.rate * before)
        return self.after_norm(x)

    def _blocks(self, blocks: nn.ModuleList, x: Tensor, past: Past, before: int) -> Tensor:
        time, width = x.shape[1:]
        distances = distance_table(time, before + time, width, x.device).to(x.dtype)
        for block in blocks:
            x = block(x, distances, past)
        return x
