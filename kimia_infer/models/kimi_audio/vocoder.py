"""Mel frames to a wave: a BigVGAN generator with anti-aliased activations.

Its nonlinearity, SnakeBeta, is computed at twice the rate, between two low-pass filters, which
keeps the harmonics that it creates from folding back. The mels of several streams are vocoded
together, and the chunks of each are joined with an overlap.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimia_infer.layers.operators import operator
from kimia_infer.models.kimi_audio.config import VocoderConfig
from kimia_infer.utils.graphs import Graphs, Recorded
from kimia_infer.weights.component import Component, Slot, fold_weight_norm
from kimia_infer.weights.tensors import open_model_file

EAGER_FRAMES = 160
"""Mel frames that are vocoded together where operations are launched one by one. With more of
them the signals of a layer leave the caches of a CPU."""

OUTER_KERNEL = 7  # of the first and the last convolution, published implementation

# Low-pass filter at a quarter of the doubled rate; published configuration.
TAPS = 12
CUTOFF = 0.25
HALF_WIDTH = 0.3


@functools.cache
def low_pass_filter() -> tuple[float, ...]:
    """The windowed sinc (Kaiser window) of both rate changes, with sum 1."""
    half = TAPS // 2
    attenuation = 2.285 * (half - 1) * math.pi * 4 * HALF_WIDTH + 7.95
    beta = 0.1102 * (attenuation - 8.7)  # Kaiser's formula above 50 dB, where this filter is
    taps = np.kaiser(TAPS, beta) * np.sinc(2 * CUTOFF * (np.arange(-half, half) + 0.5))
    return tuple((taps / taps.sum()).tolist())


def upsample(x: Tensor) -> tuple[Tensor, Tensor]:
    """The even and the odd samples of x [..., time] at twice the rate, each [..., time]."""
    return _Upsample.apply(x)


def downsample(even: Tensor, odd: Tensor) -> Tensor:
    """Back to half the rate, from the even and the odd samples, each [..., time]."""
    return _Downsample.apply(even, odd)


class _Upsample(torch.autograd.Function):
    """The gradient is a filter too; autograd would run one operation per tap."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        taps = [2 * tap for tap in reversed(low_pass_filter())]
        padded = F.pad(x, (3, 3), mode="replicate")
        return _correlate(padded[..., :-1], taps[0::2]), _correlate(padded[..., 1:], taps[1::2])

    @staticmethod
    def backward(ctx: Any, even: Tensor, odd: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        taps = [2 * tap for tap in reversed(low_pass_filter())]
        padded = _spread(even, taps[0::2], (0, 1)).add_(_spread(odd, taps[1::2], (1, 0)))
        return _fold(padded, 3, 3)


class _Downsample(torch.autograd.Function):
    """As :class:`_Upsample`. At both edges the first even and the last odd sample repeat."""

    @staticmethod
    def forward(ctx: Any, even: Tensor, odd: Tensor) -> Tensor:
        taps = low_pass_filter()
        first, last = even[..., :1], odd[..., -1:]
        even = torch.cat([first, first, even, last, last, last], dim=-1)
        odd = torch.cat([first, first, first, odd, last, last], dim=-1)
        return _correlate(odd, taps[0::2], total=_correlate(even, taps[1::2]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyrefly: ignore[bad-override]
        taps = low_pass_filter()
        even, odd = _spread(grad, taps[1::2]), _spread(grad, taps[0::2])
        first, last = odd[..., :3].sum(-1), even[..., -3:].sum(-1)
        even, odd = _fold(even[..., :-3], 2, 0), _fold(odd[..., 3:], 0, 2)
        even[..., 0] += first
        odd[..., -1] += last
        return even, odd


def _correlate(x: Tensor, taps: Sequence[float], total: Tensor | None = None) -> Tensor:
    """Sum of ``taps[k] * x[..., n + k]``, shorter than x by ``len(taps) - 1``; onto ``total``.

    Shifted sums are several times faster than a per-channel convolution on a CPU.
    """
    length = x.shape[-1] - len(taps) + 1
    terms = [(x[..., shift : shift + length], tap) for shift, tap in enumerate(taps)]
    if total is None:
        first, tap = terms.pop(0)
        total = first * tap
    for shifted, tap in terms:
        total.add_(shifted, alpha=tap)
    return total


def _spread(grad: Tensor, taps: Sequence[float], longer: tuple[int, int] = (0, 0)) -> Tensor:
    """Gradient of x, where ``grad[n]`` is that of the sum of ``taps[k] * x[n + k]``.

    ``longer``: values before and after those, of which there is no gradient.
    """
    reach = len(taps) - 1
    padded = F.pad(grad, (reach + longer[0], reach + longer[1]))
    length = padded.shape[-1] - reach
    total = padded[..., reach:] * taps[0]
    for shift, tap in enumerate(taps[1:], 1):
        total.add_(padded[..., reach - shift : reach - shift + length], alpha=tap)
    return total


def _fold(padded: Tensor, before: int, after: int) -> Tensor:
    """Gradient of x from that of x with its edges repeated ``before`` and ``after`` times."""
    end = padded.shape[-1] - after
    inner = padded[..., before:end].clone()
    if before:
        inner[..., 0] += padded[..., :before].sum(-1)
    if after:
        inner[..., -1] += padded[..., end:].sum(-1)
    return inner


@operator(
    "anti_aliased_snake(Tensor x, Tensor log_alpha, Tensor log_beta, float[] taps) -> Tensor",
    "snake_kernels.anti_aliased_snake",
    fake=lambda x, log_alpha, log_beta, taps: x.new_empty(x.shape),
)
def anti_aliased_snake(
    x: Tensor, log_alpha: Tensor, log_beta: Tensor, taps: Sequence[float]
) -> Tensor:
    """SnakeBeta at twice the rate of x [..., channels, time], in fp32 and rounded once.

    log_alpha and log_beta [channels] are its parameters; ``taps`` are :func:`low_pass_filter`.
    """
    given = coefficients(log_alpha, log_beta)
    even, odd = (snake_beta(y, *given) for y in upsample(x.float()))
    return downsample(even, odd).to(x.dtype)


def snake_beta(x: Tensor, frequency: Tensor, amplitude: Tensor) -> Tensor:
    """x + amplitude * sin(x * frequency)^2."""
    return torch.addcmul(x, amplitude, (x * frequency).sin_().square_())


def coefficients(log_alpha: Tensor, log_beta: Tensor) -> tuple[Tensor, Tensor]:
    """Frequency and amplitude, fp32 [channels, 1]."""
    frequency, width = log_alpha.float().exp(), log_beta.float().exp()
    return frequency[:, None], 1 / (width[:, None] + 1e-9)


class SnakeBeta(nn.Module):
    """x + sin(x * e^alpha)^2 / e^beta per channel, parameters stored as logarithms."""

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(channels))
        self.beta = nn.Parameter(torch.empty(channels))

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """Frequency and amplitude, fp32 [channels, 1]."""
        return coefficients(self.alpha, self.beta)


class AntiAliasedSnake(nn.Module):
    """SnakeBeta of x [..., channels, time], in fp32 whatever the dtype of x.

    Summing twelve taps in bf16 would round twelve times; the filters of other implementations
    also accumulate in fp32. Without ``anti_aliased``, for the first steps of a training, the rate
    is not doubled, which is several times faster and nearly the same.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.act = SnakeBeta(channels)
        self.anti_aliased = True

    def forward(self, x: Tensor) -> Tensor:
        if self.anti_aliased:
            return anti_aliased_snake(x, self.act.alpha, self.act.beta, low_pass_filter())
        return snake_beta(x.float(), *self.act.coefficients()).to(x.dtype)


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


class BatchedVocoder:
    """The vocoder, run for several mels together; ``rows`` are the sizes of its batches.

    Mels of one length make a batch. Padding would change the end of a wave, since every layer of
    the vocoder has padding of its own there.
    """

    def __init__(self, vocoder: Vocoder, graphs: Graphs, rows: Sequence[int]):
        self.vocoder, self.graphs, self.rows = vocoder, graphs, rows
        self._vocode = Recorded(vocoder, graphs)

    def waves(self, mels: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The wave [hop_size * frames] of each mel [frames, mel_bins]."""
        waves: list[Tensor | None] = [None] * len(mels)
        groups: dict[int, list[tuple[int, Tensor]]] = {}
        for place, mel in enumerate(mels):
            if mel is not None:
                groups.setdefault(len(mel), []).append((place, mel))
        for frames, rest in groups.items():
            most = self.rows[-1] if self.graphs.captures else max(1, EAGER_FRAMES // frames)
            while rest:
                count = max(rows for rows in self.rows if rows <= min(most, len(rest)))
                batch, rest = rest[:count], rest[count:]
                found = self._vocode(torch.stack([mel for _, mel in batch]))
                for (place, _), wave in zip(batch, found, strict=True):
                    waves[place] = wave
        return waves

    def record(self, lengths: Iterable[int]) -> None:
        """Record mels of so many frames, so that :meth:`waves` of them records nothing."""
        vocoder = self.vocoder
        place = {"device": vocoder.device, "dtype": vocoder.dtype}
        for frames in lengths:
            for rows in self.rows:
                mel = torch.zeros(rows, frames, vocoder.config.mel_bins, **place)
                self._vocode.record(mel)


class WaveOverlap:
    """The wave side of one stream: chunks are vocoded with an overlap and cross-faded.

    The end of every chunk is held back (``mel`` [frames, mel_bins] and its ``wave``
    [hop_size * frames]), vocoded again together with the next chunk and faded over. As
    published, the two halves of the Hamming window do not sum to one, so the overlap is up to
    8 % louder, and the last chunk is not faded at all.
    """

    def __init__(self, vocoder: Vocoder):
        place = {"device": vocoder.device, "dtype": vocoder.dtype}
        self.mel = torch.empty(0, vocoder.config.mel_bins, **place)
        self.wave = torch.empty(0, **place)

    def joined(self, mel: Tensor, final: bool) -> Tensor | None:
        """What is vocoded for the chunk mel [frames, mel_bins]; None if nothing is released.

        Changes nothing.
        """
        if len(mel) == 0 and not final:
            return None
        return torch.cat([self.mel, mel.to(self.mel)])

    def release(self, mel: Tensor, wave: Tensor, final: bool) -> Tensor:
        """The part [samples] of ``wave``, the vocoded :meth:`joined` mel, that goes out."""
        if final:
            self.mel, self.wave = mel[:0], wave[:0]
            return wave
        held = len(self.mel)
        frames = released_frames(held, len(mel))
        released = wave[: frames * (len(wave) // len(mel))]
        if held:
            released = _cross_fade(self.wave, released)
        # Copies, so that they do not keep all the rest.
        self.mel, self.wave = mel[frames:].clone(), wave[len(released) :].clone()
        return released


def released_frames(held: int, joined: int) -> int:
    """Mel frames that go out of those ``joined`` from the ``held`` ones and a chunk's.

    Twice what was held back, the first half faded; of a short chunk, half.
    """
    return 2 * held if joined - held > held > 0 else joined // 2


def _cross_fade(old: Tensor, new: Tensor) -> Tensor:
    """``new`` with its first half faded in over the beginning of ``old``."""
    # As published, computed in fp32 and then rounded to the dtype of the wave.
    window = torch.hamming_window(len(new), periodic=True, device=new.device).to(new.dtype)
    half = len(new) // 2
    rise, fall = window[:half], window[len(new) - half :]
    return torch.cat([old[:half] * fall + new[:half] * rise, new[half:]])


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
