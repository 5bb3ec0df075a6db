"""How long each phoneme is, and the curves of pitch and energy over the frames."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kimia_infer.models.kokoro.config import KokoroConfig
from kimia_infer.models.kokoro.layers import AdaLayerNorm, BiLSTM, Conv, Rows, StyledBlock


class DurationEncoder(nn.Module):
    """LSTMs with the style beside their input: [lstm, norm, lstm, norm, ...]."""

    def __init__(self, channels: int, style: int, depth: int):
        super().__init__()
        self.lstms = nn.ModuleList()
        for _ in range(depth):
            self.lstms.append(BiLSTM(channels + style, channels))
            self.lstms.append(AdaLayerNorm(style, channels))

    def forward(self, x: Tensor, style: Tensor, rows: Rows) -> Tensor:
        """x [batch, time, channels] -> [batch, time, channels + style], the style appended."""
        beside = style[:, None].expand(-1, x.shape[1], -1)
        x = rows.clear(torch.cat([x, beside], dim=-1))
        for lstm, norm in zip(self.lstms[::2], self.lstms[1::2], strict=True):
            x = rows.clear(torch.cat([norm(lstm(x, rows), style), beside], dim=-1))
        return x


class DurationProjection(nn.Module):
    """A linear layer under its published name."""

    def __init__(self, channels: int, longest: int):
        super().__init__()
        self.linear_layer = nn.Linear(channels, longest)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_layer(x)


class ProsodyPredictor(nn.Module):
    """Durations from encoded phonemes, then pitch and energy from their frames.

    Its five LSTMs, ``text_encoder.lstms[::2]``, ``lstm`` and ``shared``, are called with
    ([batch, time, inputs], rows) alone, so that another module of that kind can take their place.
    """

    def __init__(self, channels: int, style: int, depth: int, longest: int):
        super().__init__()
        self.text_encoder = DurationEncoder(channels, style, depth)
        self.lstm = BiLSTM(channels + style, channels)
        self.duration_proj = DurationProjection(channels, longest)
        self.shared = BiLSTM(channels + style, channels)
        self.F0, self.N = _curve_blocks(channels, style), _curve_blocks(channels, style)
        self.F0_proj, self.N_proj = Conv(channels // 2, 1, 1), Conv(channels // 2, 1, 1)

    @classmethod
    def of(cls, config: KokoroConfig) -> ProsodyPredictor:
        return cls(config.hidden_dim, config.style_dim, config.n_layer, config.max_dur)

    def durations(self, d: Tensor, rows: Rows) -> Tensor:
        """Encoded phonemes [batch, time, channels + style] -> logits [batch, time, longest]."""
        return self.duration_proj(self.lstm(d, rows))

    def curves(self, frames: Tensor, style: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Pitch in Hz and energy, both [batch, 2 * time], zero behind each end.

        ``frames`` [batch, time, channels + style] are encoded phonemes, repeated for each frame.
        """
        x = self.shared(frames, rows)
        pairs = ((self.F0, self.F0_proj), (self.N, self.N_proj))
        pitch, energy = (self._curve(blocks, last, x, style, rows) for blocks, last in pairs)
        return pitch, energy

    @staticmethod
    def _curve(blocks: nn.ModuleList, last: Conv, x: Tensor, style: Tensor, rows: Rows) -> Tensor:
        for block in blocks:
            x = block(x, style, rows)
            rows = rows if block.pool is None else rows.times(2)  # pyrefly: ignore
        return rows.clear(last(x))[..., 0]


def _curve_blocks(channels: int, style: int) -> nn.ModuleList:
    half = channels // 2
    return nn.ModuleList(
        [
            StyledBlock(style, channels, channels),
            StyledBlock(style, channels, half, upsample=True),
            StyledBlock(style, half, half),
        ]
    )


def round_durations(logits: Tensor, speed: Tensor, rows: Rows) -> Tensor:
    """Whole frames of each phoneme, at least one: int64 [batch, time], 0 behind each end.

    logits [batch, time, longest]; speed [batch] divides the durations. Halves are rounded to the
    even number, as published.
    """
    frames = expected_durations(logits) / speed[:, None]
    return rows.clear(frames.round().clamp(min=1)[..., None])[..., 0].long()


def expected_durations(logits: Tensor) -> Tensor:
    """Frames before speed and rounding: [batch, time, longest] -> [batch, time]."""
    return torch.sigmoid(logits).sum(-1)


def repeat_phonemes(x: Tensor, durations: Tensor, frames: int) -> Tensor:
    """x [batch, time, channels] repeated by durations [batch, time]: [batch, frames, channels].

    Zeros behind the end of a row. ``frames`` is the longest sum of durations.
    """
    ends = durations.cumsum(1)
    places = torch.arange(frames, device=x.device).expand(len(x), -1).contiguous()
    source = torch.searchsorted(ends, places, right=True)
    inside = source < x.shape[1]
    source = source.clamp(max=x.shape[1] - 1)
    repeated = x.gather(1, source[..., None].expand(-1, -1, x.shape[2]))
    return repeated if len(x) == 1 else repeated * inside[..., None]
