"""VQ02: 16.67 codes a second, the nearest of 1024 centres to rows of a streaming encoder.

The published code goes through the recording in chunks of 240 ms and carries a state. What a chunk
sees of others are keys and values of the same layer, so here all chunks go through each layer as
one batch of windows: the same function with one call where there were hundreds. Where the published
features get unseeded noise of one step of 16-bit PCM (dither), here they get none, so that codes
are the same every time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimia_infer.audio.fbank import BINS, frame_count, hamming_window, kaldi_fbank
from kimia_infer.audio.files import FULL_SCALE
from kimia_infer.models.step_audio_editx.config import SanmConfig
from kimia_infer.utils.errors import CheckpointError

CHUNK_SAMPLES = 3840
SHORTEST_TAIL = 880
"""Samples behind the last chunk, or of a whole recording, that give no code if there are fewer."""

STACKED, STEP = 7, 6
"""Frames that are joined to a row, and between one row and the next."""
FEATURES = STACKED * BINS

ROWS, CONTEXT = 4, 5
"""Rows of a chunk, and those before it that its window has, too."""
WINDOW = CONTEXT + ROWS
LOOK_BACK = 4
"""Windows before, whose first rows a window attends to."""
NORM_EPS = 1e-12  # published implementation


def row_count(samples: int) -> int:
    """Rows, and so codes, of a wave at 16 kHz."""
    chunks, tail = divmod(samples, CHUNK_SAMPLES)
    if tail < SHORTEST_TAIL:
        return ROWS * chunks
    if not chunks:
        return math.ceil(frame_count(samples) / STEP)
    return ROWS * chunks + math.ceil(((tail - 80) // 160 - 1) / STEP)


def features(wave: Tensor) -> Tensor:
    """Joined frames float32 [row_count, FEATURES] of a wave [samples] at 16 kHz.

    Three copies of the first frame stand in front; the last row repeats the last frame.
    """
    rows = row_count(len(wave))
    if not rows:
        return wave.new_zeros(0, FEATURES)
    frames = kaldi_fbank(wave * FULL_SCALE, hamming_window(wave.device))
    row = torch.arange(rows, device=wave.device)[:, None]
    places = row * STEP + torch.arange(STACKED, device=wave.device) - STACKED // 2
    return frames[places.clamp(0, len(frames) - 1)].flatten(1)


class Normalization(nn.Module):
    """(features + shift) * scale, of the training data; both float32 [FEATURES]."""

    def __init__(self, shift: Tensor, scale: Tensor):
        super().__init__()
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale)

    @classmethod
    def from_file(cls, path: Path) -> Normalization:
        """Read ``am.mvn``: in Kaldi's text format, a list of numbers for each of the two."""
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error})") from error
        try:
            lists = [
                torch.tensor([float(number) for number in found.split()])
                for found in re.findall(r"<LearnRateCoef>\s+\S+\s+\[([^]]*)\]", text)
            ]
        except ValueError as error:
            raise CheckpointError(f"{path}: not numbers ({error})") from error
        if [len(numbers) for numbers in lists] != [FEATURES, FEATURES]:
            raise CheckpointError(
                f"{path}: expected a shift and a scale of {FEATURES} numbers, "
                f"found lists of {[len(numbers) for numbers in lists]}"
            )
        return cls(*lists)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.shift) * self.scale


@dataclass(frozen=True)
class Windows:
    """How the windows of a batch see each other.

    ``before`` int64 [windows, LOOK_BACK] are the windows before each, ``seen`` bool
    [windows, 1, 1, keys] the keys that exist, and ``filled`` [windows, WINDOW, 1] the own rows.
    """

    before: Tensor
    seen: Tensor
    filled: Tensor

    @classmethod
    def of(cls, counts: Sequence[int], device: torch.device) -> Windows:
        """Those of recordings of ``counts`` rows, one after the other."""
        before, exist, filled, first = [], [], [], 0
        for count in counts:
            windows = math.ceil(count / ROWS)
            own = torch.arange(windows)[:, None]
            back = own - torch.arange(LOOK_BACK, 0, -1)
            before.append(first + back.clamp(min=0))
            exist.append(back >= 0)
            filled.append(torch.arange(WINDOW) < CONTEXT + count - ROWS * own)
            first += windows
        own_rows = torch.cat(filled)
        seen = torch.cat([torch.cat(exist).repeat_interleave(ROWS, dim=1), own_rows], dim=1)
        return cls(
            torch.cat(before).to(device),
            seen[:, None, None].to(device),
            own_rows[..., None].to(device),
        )


class SanmAttention(nn.Module):
    """Attention, and beside it a convolution over the values of the window."""

    def __init__(self, inputs: int, config: SanmConfig):
        super().__init__()
        width, self.heads = config.width, config.heads
        self.linear_q_k_v = nn.Linear(inputs, 3 * width)
        self.linear_out = nn.Linear(width, width)
        self.fsmn_block = nn.Conv1d(
            width, width, config.kernel, padding=config.kernel // 2, groups=width, bias=False
        )

    def forward(self, x: Tensor, windows: Windows) -> Tensor:
        """x [windows, WINDOW, inputs] -> [windows, WINDOW, width]."""
        query, keys, values = self.linear_q_k_v(x).chunk(3, dim=-1)
        values = values * windows.filled
        memory = self.fsmn_block(values.mT).mT + values

        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        def joined(y: Tensor) -> Tensor:
            return heads(torch.cat([y[:, :ROWS][windows.before].flatten(1, 2), y], dim=1))

        mixed = F.scaled_dot_product_attention(
            heads(query), joined(keys), joined(values), attn_mask=windows.seen
        )
        return self.linear_out(mixed.transpose(1, 2).flatten(2)) + memory


class FeedForward(nn.Module):
    def __init__(self, config: SanmConfig):
        super().__init__()
        self.w_1 = nn.Linear(config.width, config.inner)
        self.w_2 = nn.Linear(config.inner, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(F.relu(self.w_1(x)))


class Block(nn.Module):
    """The first block, whose input has another width, adds nothing to its attention."""

    def __init__(self, inputs: int, config: SanmConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(inputs, eps=NORM_EPS)
        self.norm2 = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.self_attn = SanmAttention(inputs, config)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, windows: Windows) -> Tensor:
        attended = self.self_attn(self.norm1(x), windows)
        x = x + attended if x.shape == attended.shape else attended
        return x + self.feed_forward(self.norm2(x))


class SanmEncoder(nn.Module):
    """Parameters are named as below ``encoder.`` of the published file."""

    def __init__(self, config: SanmConfig):
        super().__init__()
        self.config = config
        self.encoders0 = nn.ModuleList([Block(FEATURES, config)])
        self.encoders = nn.ModuleList(Block(config.width, config) for _ in range(config.blocks - 1))
        self.after_norm = nn.LayerNorm(config.width, eps=NORM_EPS)

    def forward(self, recordings: Sequence[Tensor]) -> list[Tensor]:
        """[rows, width] for the normalized features [rows, FEATURES] of each recording."""
        counts = [len(rows) for rows in recordings]
        x = torch.cat([self._windows(rows) for rows in recordings])
        windows = Windows.of(counts, x.device)
        for block in (*self.encoders0, *self.encoders):
            x = block(x, windows)
        kept = self.after_norm(x[:, CONTEXT:])
        split = kept.split([math.ceil(count / ROWS) for count in counts])
        return [y.flatten(0, 1)[:count] for y, count in zip(split, counts, strict=True)]

    def _windows(self, rows: Tensor) -> Tensor:
        """[windows, WINDOW, FEATURES] with positions; zeros before the first row."""
        scaled = rows * math.sqrt(self.config.width) + positions(len(rows), rows.device)
        behind = -len(rows) % ROWS
        return F.pad(scaled, (0, 0, CONTEXT, behind)).unfold(0, WINDOW, ROWS).mT


def positions(count: int, device: torch.device) -> Tensor:
    """Sinusoids float32 [count, FEATURES] of the positions 1 .. count."""
    half = FEATURES // 2
    rates = torch.exp(torch.arange(half, device=device) * -(math.log(10_000) / (half - 1)))
    angles = torch.arange(1, count + 1, device=device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Vq02(nn.Module):
    """Waves to codes. ``centers`` float32 [codes, width]; everything is float32."""

    def __init__(self, encoder: SanmEncoder, normalization: Normalization, centers: Tensor):
        super().__init__()
        self.encoder, self.normalization = encoder, normalization
        self.register_buffer("centers", centers)

    def forward(self, waves: Sequence[Tensor]) -> list[list[int]]:
        """The codes of waves [samples] at 16 kHz, which share one batch."""
        rows = [self.normalization(features(wave)) for wave in waves]
        return [self.nearest(encoded).tolist() for encoded in self.encoder(rows)]

    def nearest(self, encoded: Tensor) -> Tensor:
        """int64 [rows] of encoded [rows, width]: the centres at the least distance."""
        return (self.centers.square().sum(1) - 2 * encoded @ self.centers.T).argmin(1)
