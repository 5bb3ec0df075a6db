"""What the parts of Kokoro are built from; signals are [batch, time, channels].

Rows of a batch have their own lengths. A row gives the same result alone and in a batch, because
nothing behind its end is ever read: convolutions find zeros there, as they do beyond the end of a
row that is alone, statistics over time leave it out, and recurrent layers stop before it.

Time comes before channels, and one-dimensional convolutions are computed as flat two-dimensional
ones: on CPUs oneDNN then reads and writes signals as they are, which saves two conversions of
every signal (see docs/kokoro.md).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

EPSILON = 1e-5  # of every normalization but ALBERT's, published implementation


class Rows:
    """The lengths of the rows of a batch, int64 [batch]; None where all of them are full."""

    def __init__(self, lengths: Tensor | None = None):
        self.lengths = lengths
        self._masks: dict[int, Tensor] = {}

    def times(self, factor: int, more: int = 0) -> Rows:
        """The rows of a signal with ``factor`` frames for each of this one, and ``more``."""
        return Rows(None if self.lengths is None else self.lengths * factor + more)

    def mask(self, size: int) -> Tensor | None:
        """Which of ``size`` frames belong to each row: bool [batch, size, 1]."""
        if self.lengths is None:
            return None
        if size not in self._masks:
            places = torch.arange(size, device=self.lengths.device)
            self._masks[size] = (places < self.lengths[:, None])[..., None]
        return self._masks[size]

    def clear(self, x: Tensor) -> Tensor:
        """x [batch, time, channels] with zeros behind the end of each row."""
        mask = self.mask(x.shape[1])
        return x if mask is None else x * mask


class Conv(nn.Conv1d):
    """A convolution over time; what is behind the end of a row must be zero."""

    def forward(self, input: Tensor) -> Tensor:
        """input [batch, time, in] -> [batch, time, out]."""
        flat = input.contiguous()[:, None].permute(0, 3, 1, 2)
        out = F.conv2d(
            flat,
            self.weight[:, :, None],
            self.bias,
            (1, self.stride[0]),
            (0, int(self.padding[0])),
            (1, self.dilation[0]),
            self.groups,
        )
        return out.permute(0, 2, 3, 1)[:, 0]


class TransposedConv(nn.ConvTranspose1d):
    """As :class:`Conv`, to a higher rate."""

    def forward(self, input: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        """input [batch, time, in] -> [batch, stride * time, out]."""
        flat = input.contiguous()[:, None].permute(0, 3, 1, 2)
        out = F.conv_transpose2d(
            flat,
            self.weight[:, :, None],
            self.bias,
            (1, self.stride[0]),
            (0, int(self.padding[0])),
            (0, self.output_padding[0]),
            self.groups,
        )
        return out.permute(0, 2, 3, 1)[:, 0]


class BiLSTM(nn.LSTM):
    """One bidirectional layer; the backward pass of a row begins at the row's own end."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs // 2, batch_first=True, bidirectional=True)

    def forward(self, input: Tensor, rows: Rows) -> Tensor:  # pyrefly: ignore[bad-override]
        """input [batch, time, inputs] -> [batch, time, outputs], zeros behind each end."""
        if rows.lengths is None:
            return super().forward(input)[0]
        packed = pack_padded_sequence(
            input, rows.lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        output, _ = super().forward(packed)
        return pad_packed_sequence(output, batch_first=True, total_length=input.shape[1])[0]


class AdaLayerNorm(nn.Module):
    """Layer norm over channels whose scale and shift come from the style.

    ``fc`` gives the scale itself; the published one, that less one.
    """

    def __init__(self, style: int, channels: int):
        super().__init__()
        self.fc = nn.Linear(style, 2 * channels)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """x [batch, time, channels], style [batch, style] -> as x."""
        scale, shift = self.fc(style)[:, None].chunk(2, dim=-1)
        return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPSILON), scale)


class AdaIN(nn.Module):
    """Instance norm over time whose scale and shift come from the style.

    ``fc`` gives scale and shift as they are applied: the one that the published layer adds, and
    the affine parameters of its norm, are part of them.
    """

    def __init__(self, style: int, channels: int):
        super().__init__()
        self.fc = nn.Linear(style, 2 * channels)

    def forward(self, x: Tensor, style: Tensor, rows: Rows) -> Tensor:
        """x [batch, time, channels], style [batch, style] -> as x, zeros behind each end."""
        scale, shift = self.fc(style)[:, None].chunk(2, dim=-1)
        mask = rows.mask(x.shape[1])
        if mask is None and len(x) == 1:  # batch norm of a single row, computed in one pass
            flat = x[:, None].permute(0, 3, 1, 2)
            out = F.batch_norm(flat, None, None, scale[0, 0], shift[0, 0], True, eps=EPSILON)
            return out.permute(0, 2, 3, 1)[:, 0]
        wide = x.float()
        if mask is None:
            count: Tensor | int = x.shape[1]
            centred = wide - wide.mean(1, keepdim=True)
        else:
            count = mask.sum(1, keepdim=True)
            centred = wide - (wide * mask).sum(1, keepdim=True) / count
            centred = centred * mask
        variance = centred.square().sum(1, keepdim=True) / count
        out = torch.addcmul(shift, centred, scale * torch.rsqrt(variance + EPSILON))
        return (out if mask is None else out * mask).to(x.dtype)


class StyledBlock(nn.Module):
    """Two convolutions, each behind AdaIN and leaky ReLU, beside a shortcut; twice the rate if
    ``upsample``."""

    def __init__(self, style: int, inputs: int, outputs: int, upsample: bool = False):
        super().__init__()
        self.norm1, self.norm2 = AdaIN(style, inputs), AdaIN(style, outputs)
        self.conv1 = Conv(inputs, outputs, 3, padding=1)
        self.conv2 = Conv(outputs, outputs, 3, padding=1)
        self.conv1x1 = nn.Linear(inputs, outputs, bias=False) if inputs != outputs else None
        self.pool = (
            TransposedConv(inputs, inputs, 3, 2, padding=1, output_padding=1, groups=inputs)
            if upsample
            else None
        )

    def forward(self, x: Tensor, style: Tensor, rows: Rows) -> Tensor:
        """x [batch, time, inputs] -> [batch, time or 2 * time, outputs]; behind ends anything."""
        y = F.leaky_relu(self.norm1(x, style, rows), 0.2)
        if self.pool is not None:
            rows = rows.times(2)
            y = rows.clear(self.pool(y))
        y = F.leaky_relu(self.norm2(self.conv1(y), style, rows), 0.2)
        shortcut = x if self.conv1x1 is None else self.conv1x1(x)
        if self.pool is not None:
            shortcut = shortcut.repeat_interleave(2, dim=1)
        return (self.conv2(y) + shortcut) * math.sqrt(0.5)
