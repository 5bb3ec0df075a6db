"""The vocoder: a mel spectrogram to the spectrum of a wave, beside sines of its pitch.

The random initial phases of the published code are left out: it computes the phase at the rate of
the spectrogram, and they have no effect on it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimia_infer.audio.files import Check
from kimia_infer.layers.harmonics import Source
from kimia_infer.models.step_audio_editx.config import VocoderConfig
from kimia_infer.weights.component import Slot, fold_weight_norm
from kimia_infer.weights.tensors import TensorStore

OUTER_KERNEL, PITCH_KERNEL, PITCH_LAYERS = 7, 3, 5
LOUDEST_BIN = 100.0
SNAKE_FLOOR = 1e-9
"""Fixed in the published implementation."""


class PitchPredictor(nn.Module):
    """Names of layers are their places among those with activations."""

    def __init__(self, config: VocoderConfig):
        super().__init__()
        width = config.pitch.width
        inputs = [config.mel_bins, *([width] * (PITCH_LAYERS - 1))]
        self.condnet = nn.ModuleDict(
            {
                str(2 * place): nn.Conv1d(channels, width, PITCH_KERNEL, padding=1)
                for place, channels in enumerate(inputs)
            }
        )
        self.classifier = nn.Linear(width, 1)

    def forward(self, mel: Tensor) -> Tensor:
        """Pitch in Hz [batch, frames] of mel [batch, bins, frames]."""
        for conv in self.condnet.values():
            mel = F.elu(conv(mel))
        return self.classifier(mel.mT)[..., 0].abs()


class Snake(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        """x + sin(a x)^2 / a, with a of each channel; x [batch, channels, time]."""
        alpha = self.alpha[:, None]
        return x + torch.sin(x * alpha).square() / (alpha + SNAKE_FLOOR)


class ResidualBlock(nn.Module):
    def __init__(self, channels: int, kernel: int, dilations: list[int]):
        super().__init__()
        self.convs1 = nn.ModuleList(_same(channels, kernel, d) for d in dilations)
        self.convs2 = nn.ModuleList(_same(channels, kernel, 1) for _ in dilations)
        self.activations1 = nn.ModuleList(Snake(channels) for _ in dilations)
        self.activations2 = nn.ModuleList(Snake(channels) for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        for snake1, conv1, snake2, conv2 in zip(
            self.activations1, self.convs1, self.activations2, self.convs2, strict=True
        ):
            x = x + conv2(snake2(conv1(snake1(x))))
        return x


def _same(channels: int, kernel: int, dilation: int) -> nn.Conv1d:
    padding = (kernel - 1) * dilation // 2
    return nn.Conv1d(channels, channels, kernel, dilation=dilation, padding=padding)


class Vocoder(nn.Module):
    """Parameters are named as in the published checkpoint, weight norm folded."""

    def __init__(self, config: VocoderConfig):
        super().__init__()
        self.config = config
        self.f0_predictor = PitchPredictor(config)
        self.m_source = Source(config.frame_samples, config.harmonics, config.sample_rate)
        self.conv_pre = nn.Conv1d(
            config.mel_bins, config.width, OUTER_KERNEL, padding=OUTER_KERNEL // 2
        )
        self.ups, self.source_downs = nn.ModuleList(), nn.ModuleList()
        self.source_resblocks, self.resblocks = nn.ModuleList(), nn.ModuleList()
        channels, step = config.width, config.frame_samples // config.spectrum.hop
        for stage, (rate, kernel) in enumerate(zip(config.rates, config.kernels, strict=True)):
            channels, step = channels // 2, step // rate
            self.ups.append(
                nn.ConvTranspose1d(
                    2 * channels, channels, kernel, rate, padding=(kernel - rate) // 2
                )
            )
            self.source_downs.append(_source_conv(config.spectrum.values, channels, step))
            kernels, dilations = config.source_block_kernels, config.source_block_dilations
            self.source_resblocks.append(ResidualBlock(channels, kernels[stage], dilations[stage]))
            for block, spread in zip(config.block_kernels, config.block_dilations, strict=True):
                self.resblocks.append(ResidualBlock(channels, block, spread))
        self.conv_post = nn.Conv1d(
            channels, config.spectrum.values, OUTER_KERNEL, padding=OUTER_KERNEL // 2
        )

    def forward(self, mel: Tensor, noise: Tensor | None) -> Tensor:
        """Wave float32 [frames * frame_samples] of mel [frames, bins].

        ``noise`` of the source is standard normal [samples, harmonics]; None leaves it out.
        """
        x = mel.T[None]
        pitch = self.f0_predictor(x)
        source = self.m_source(pitch, None if noise is None else noise[None])
        return self.decode(x, source)[0]

    def decode(self, mel: Tensor, source: Tensor, check: Check = lambda: None) -> Tensor:
        """Wave [batch, samples] of mel [batch, bins, frames] and source [batch, samples].

        ``check`` is called between blocks; it raises to end the work.
        """
        size, hop = self.config.spectrum.size, self.config.spectrum.hop
        window = torch.hann_window(size, device=mel.device)
        spectrum = torch.stft(source, size, hop, window=window, return_complex=True)
        beside = torch.cat([spectrum.real, spectrum.imag], dim=1)
        x, branches = self.conv_pre(mel), len(self.config.block_kernels)
        for stage, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, self.config.slope))
            if stage == len(self.ups) - 1:  # spectra have one frame more
                x = torch.cat([x[..., 1:2], x], dim=-1)
            x = x + self.source_resblocks[stage](self.source_downs[stage](beside))
            blocks = self.resblocks[stage * branches : (stage + 1) * branches]
            branched = []
            for block in blocks:
                check()
                branched.append(block(x))
            x = torch.stack(branched).mean(0)
        out = self.conv_post(F.leaky_relu(x))
        magnitude, angle = out.split(self.config.spectrum.bins, dim=1)
        polar = torch.polar(magnitude.exp().clamp(max=LOUDEST_BIN), angle.sin())
        wave = torch.istft(polar, size, hop, window=window)
        return wave.clamp(-self.config.limit, self.config.limit)


class WaveStream:
    """A mel spectrogram to a wave piece by piece: the wave of the whole, but for rounding.

    A sample depends on frames up to ``reach`` away and on the pitch of all before, so that samples
    come when the frames behind them are there. ``noise`` gives the next samples of the source's
    noise, as many as it is called with, [samples, harmonics].
    """

    def __init__(
        self,
        vocoder: Vocoder,
        noise: Callable[[int], Tensor],
        check: Check = lambda: None,
    ):
        self._vocoder, self._noise, self._check = vocoder, noise, check
        parameter = vocoder.conv_pre.weight
        self._mel = parameter.new_zeros(0, vocoder.config.mel_bins)
        self._pitch = parameter.new_zeros(0)
        self._hiss = parameter.new_zeros(0, vocoder.config.harmonics)
        self._made = 0

    def push(self, mel: Tensor, last: bool) -> Tensor:
        """The wave float32 [samples] behind that of the calls before; with ``last`` all of it.

        mel [frames, bins] continues that of the calls before.
        """
        self._mel = torch.cat([self._mel, mel])
        samples = self._vocoder.config.frame_samples
        source = self._source(last)
        reach = self._vocoder.config.reach
        begin, end = max(0, self._made - reach), len(source) // samples
        made = max(self._made, end if last else end - reach)
        if made == self._made:
            return source[:0]
        piece = self._mel[None, begin:end].mT, source[None, begin * samples :]
        wave = self._vocoder.decode(*piece, self._check)[0]
        wave = wave[(self._made - begin) * samples : (made - begin) * samples]
        self._made = made
        return wave

    def _source(self, last: bool) -> Tensor:
        """The source float32 [samples] of all frames whose pitch is known, but the last."""
        known, total = len(self._pitch), len(self._mel)
        begin = max(0, known - PITCH_LAYERS)
        pitch = self._vocoder.f0_predictor(self._mel[None, begin:].mT)[0]
        end = total if last else max(known, total - PITCH_LAYERS)
        self._pitch = torch.cat([self._pitch, pitch[known - begin : end - begin]])
        samples = self._vocoder.config.frame_samples
        wanted = samples * len(self._pitch)
        self._hiss = torch.cat([self._hiss, self._noise(wanted - len(self._hiss))])
        source = self._vocoder.m_source(self._pitch[None], self._hiss[None])[0]
        return source if last else source[: max(0, wanted - samples)]


def _source_conv(values: int, channels: int, step: int) -> nn.Conv1d:
    """From the rate of spectra to one that is ``step`` times lower."""
    if step == 1:
        return nn.Conv1d(values, channels, 1)
    return nn.Conv1d(values, channels, 2 * step, stride=step, padding=step // 2)


def vocoder_slots(network: nn.Module, store: TensorStore) -> list[Slot]:
    """Every parameter, and the two tensors whose weight norm is folded into it, if it has one."""
    slots = []
    for name, parameter in network.named_parameters():
        shape = tuple(parameter.shape)
        stored = f"{name.removesuffix('weight')}parametrizations.weight.original"
        if name.endswith(".weight") and f"{stored}0" in store.tensors:
            pair = {f"{stored}0": (shape[0], 1, 1), f"{stored}1": shape}
            slots.append(Slot(name, pair, combine=fold_weight_norm))
        else:
            slots.append(Slot(name, {name: shape}))
    return slots
