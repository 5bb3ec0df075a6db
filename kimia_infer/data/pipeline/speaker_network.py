"""A voice to the vector that stands for it: CAM++, trained on Chinese and English voices.

The network is that of 3D-Speaker (https://arxiv.org/abs/2303.00332), which has no release on the
package index; names of modules are those of its checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from kimia_infer.audio.fbank import BINS, kaldi_fbank, povey_window

SIZE = 192
"""Values of a vector."""
WIDTH, GROWTH, BOTTLENECK = 128, 32, 128
BLOCKS = ((12, 1), (24, 2), (16, 2))
"""Layers and dilation of each dense block."""
CONTEXT_FRAMES = 100
"""The mean of so many frames tells each layer what is spoken around a frame."""

BATCH = 32


def _normed(channels: int, affine: bool = True) -> nn.Sequential:
    norm = nn.Sequential()
    norm.add_module("batchnorm", nn.BatchNorm1d(channels, affine=affine))
    return norm


class _Residual(nn.Module):
    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, (stride, 1), 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride > 1:
            projection = nn.Conv2d(channels, channels, 1, (stride, 1), bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        found = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(found + self.shortcut(x))


class _Front(nn.Module):
    """Log mel energies [batch, BINS, frames] to [batch, 32 * BINS / 8, frames]."""

    def __init__(self, channels: int = 32):
        super().__init__()
        self.channels = channels * BINS // 8
        self.conv1 = nn.Conv2d(1, channels, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.layer1 = nn.Sequential(_Residual(channels, 2), _Residual(channels, 1))
        self.layer2 = nn.Sequential(_Residual(channels, 2), _Residual(channels, 1))
        self.conv2 = nn.Conv2d(channels, channels, 3, (2, 1), 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, features: Tensor) -> Tensor:
        found = F.relu(self.bn1(self.conv1(features.unsqueeze(1))))
        found = F.relu(self.bn2(self.conv2(self.layer2(self.layer1(found)))))
        return found.flatten(1, 2)


class _Mask(nn.Module):
    """A convolution whose output is masked by what is spoken around each frame."""

    def __init__(self, dilation: int):
        super().__init__()
        self.linear_local = nn.Conv1d(
            BOTTLENECK, GROWTH, 3, padding=dilation, dilation=dilation, bias=False
        )
        self.linear1 = nn.Conv1d(BOTTLENECK, BOTTLENECK // 2, 1)
        self.linear2 = nn.Conv1d(BOTTLENECK // 2, GROWTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        around = F.avg_pool1d(x, CONTEXT_FRAMES, CONTEXT_FRAMES, ceil_mode=True)
        around = around.repeat_interleave(CONTEXT_FRAMES, -1)[..., : x.shape[-1]]
        around = around + x.mean(-1, keepdim=True)
        return self.linear_local(x) * self.linear2(F.relu(self.linear1(around))).sigmoid()


class _Layer(nn.Module):
    def __init__(self, channels: int, dilation: int):
        super().__init__()
        self.nonlinear1 = _normed(channels)
        self.linear1 = nn.Conv1d(channels, BOTTLENECK, 1, bias=False)
        self.nonlinear2 = _normed(BOTTLENECK)
        self.cam_layer = _Mask(dilation)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear1(F.relu(self.nonlinear1(x)))
        return self.cam_layer(F.relu(self.nonlinear2(x)))


class _Block(nn.Module):
    """Layers, each of which sees the outputs of all before it."""

    def __init__(self, channels: int, layers: int, dilation: int):
        super().__init__()
        for index in range(layers):
            self.add_module(f"tdnnd{index + 1}", _Layer(channels + index * GROWTH, dilation))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = torch.cat([x, layer(x)], 1)
        return x


class _Transit(nn.Module):
    """Half of the channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.nonlinear = _normed(channels)
        self.linear = nn.Conv1d(channels, channels // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.relu(self.nonlinear(x)))


class _Normed(nn.Module):
    def __init__(self, linear: nn.Conv1d, affine: bool):
        super().__init__()
        self.linear = linear
        self.nonlinear = _normed(linear.out_channels, affine)

    def forward(self, x: Tensor) -> Tensor:
        return self.nonlinear(self.linear(x))


class SpeakerNetwork(nn.Module):
    """Log mel energies float32 [batch, frames, BINS] to vectors [batch, SIZE]."""

    def __init__(self) -> None:
        super().__init__()
        self.head = _Front()
        first = _Normed(nn.Conv1d(self.head.channels, WIDTH, 5, 2, 2, bias=False), affine=True)
        body: dict[str, nn.Module] = {"tdnn": first}
        channels = WIDTH
        for number, (layers, dilation) in enumerate(BLOCKS, 1):
            body[f"block{number}"] = _Block(channels, layers, dilation)
            channels += layers * GROWTH
            body[f"transit{number}"] = _Transit(channels)
            channels //= 2
        body["out_nonlinear"] = _normed(channels)
        body["dense"] = _Normed(nn.Conv1d(2 * channels, SIZE, 1, bias=False), affine=False)
        self.xvector = nn.ModuleDict(body)

    def forward(self, features: Tensor) -> Tensor:
        body = self.xvector
        x = F.relu(body["tdnn"](self.head(features.transpose(1, 2))))
        for number in range(1, len(BLOCKS) + 1):
            x = body[f"transit{number}"](body[f"block{number}"](x))
        x = F.relu(body["out_nonlinear"](x))
        pooled = torch.cat([x.mean(-1), x.std(-1)], -1)
        return body["dense"](pooled.unsqueeze(-1)).squeeze(-1)


def load_speaker_network(path: Path) -> SpeakerNetwork:
    """The network with the weights of a safetensors file."""
    network = SpeakerNetwork()
    network.load_state_dict(load_file(path))
    return network.eval().requires_grad_(False)


@torch.inference_mode()
def voice_vectors(network: SpeakerNetwork, waves: Sequence[Tensor]) -> Tensor:
    """Vectors of length 1, float32 [waves, SIZE], of waves float32 [samples] at 16 kHz.

    Waves of one length are computed together. Each has at least 400 samples, and should have half
    a second or more.
    """
    window = povey_window(torch.device("cpu"))
    lengths: dict[int, list[int]] = {}
    for index, wave in enumerate(waves):
        lengths.setdefault(len(wave), []).append(index)
    found = torch.empty(len(waves), SIZE)
    for places in lengths.values():
        for begin in range(0, len(places), BATCH):
            batch = places[begin : begin + BATCH]
            features = torch.stack([kaldi_fbank(waves[index], window) for index in batch])
            features = features - features.mean(1, keepdim=True)
            found[batch] = F.normalize(network(features), dim=-1)
    return found
