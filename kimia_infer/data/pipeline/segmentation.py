"""Who of up to three people speaks when within ten seconds: pyannote's segmentation-3.0.

The network is written here, as pyannote.audio brings a training framework and pins PyTorch, and the
package that has its weights runs it only behind a C library for AVX-512.
"""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from kimia_infer.audio.files import SAMPLE_RATE

WINDOW_SAMPLES = 10 * SAMPLE_RATE
"""What the network was trained on."""
FRAME_STEP, FRAME_LENGTH = 270, 991
"""Samples from one frame to the next, and samples that a frame sees."""
LOCAL_SPEAKERS, TOGETHER = 3, 2
"""People in a window, and how many of them may speak at a time."""

CLASSES = [c for n in range(TOGETHER + 1) for c in combinations(range(LOCAL_SPEAKERS), n)]
"""Who speaks, by class of the network: nobody, one, or two."""

FILTERS, KERNEL, STRIDE = 80, 251, 10
LOWEST_HZ, NARROWEST_HZ = 50.0, 50.0
CHANNELS, HIDDEN, LAYERS = 60, 128, 4


class SincFilters(nn.Module):
    """Band-pass filters whose two frequencies are learned, even and odd ones (SincNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.low_hz_ = nn.Parameter(torch.empty(FILTERS // 2, 1))
        self.band_hz_ = nn.Parameter(torch.empty(FILTERS // 2, 1))
        half = KERNEL // 2
        self.register_buffer("window_", torch.empty(half))
        self.register_buffer("n_", torch.empty(1, half))

    def forward(self, wave: Tensor) -> Tensor:
        low = LOWEST_HZ + self.low_hz_.abs()
        high = (low + NARROWEST_HZ + self.band_hz_.abs()).clamp(LOWEST_HZ, SAMPLE_RATE / 2)
        band = high - low
        below, above = low @ self.n_, high @ self.n_
        even = (above.sin() - below.sin()) / (self.n_ / 2) * self.window_
        odd = (below.cos() - above.cos()) / (self.n_ / 2) * self.window_
        filters = [
            torch.cat([even, 2 * band, even.flip(1)], 1) / (2 * band),
            torch.cat([odd, torch.zeros_like(band), -odd.flip(1)], 1) / (2 * band),
        ]
        return F.conv1d(wave, torch.cat(filters).unsqueeze(1), stride=STRIDE)


class FilterBank(nn.Module):
    """The loudness of the bands, [batch, 1, samples] to [batch, FILTERS, frames]."""

    def __init__(self) -> None:
        super().__init__()
        self.filterbank = SincFilters()

    def forward(self, wave: Tensor) -> Tensor:
        return self.filterbank(wave).abs()


class SincNet(nn.Module):
    """Wave [batch, 1, samples] to features [batch, CHANNELS, frames]."""

    def __init__(self) -> None:
        super().__init__()
        self.wav_norm1d = nn.InstanceNorm1d(1, affine=True)
        convolutions = [nn.Conv1d(n, CHANNELS, 5) for n in (FILTERS, CHANNELS)]
        self.conv1d = nn.ModuleList([FilterBank(), *convolutions])
        norms = [nn.InstanceNorm1d(n, affine=True) for n in (FILTERS, CHANNELS, CHANNELS)]
        self.norm1d = nn.ModuleList(norms)

    def forward(self, wave: Tensor) -> Tensor:
        found = self.wav_norm1d(wave)
        for convolution, norm in zip(self.conv1d, self.norm1d, strict=True):
            found = F.leaky_relu(norm(F.max_pool1d(convolution(found), 3)))
        return found


class SegmentationNetwork(nn.Module):
    """Waves float32 [batch, samples] at 16 kHz to scores of CLASSES [batch, frames, classes]."""

    def __init__(self) -> None:
        super().__init__()
        self.sincnet = SincNet()
        self.lstm = nn.LSTM(CHANNELS, HIDDEN, LAYERS, bidirectional=True, batch_first=True)
        self.linear = nn.ModuleList([nn.Linear(2 * HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)])
        self.classifier = nn.Linear(HIDDEN, len(CLASSES))

    def forward(self, wave: Tensor) -> Tensor:
        found, _ = self.lstm(self.sincnet(wave.unsqueeze(1)).transpose(1, 2))
        for linear in self.linear:
            found = F.leaky_relu(linear(found))
        return self.classifier(found)


def load_segmentation(path: Path) -> SegmentationNetwork:
    """The network with the weights of a safetensors file."""
    network = SegmentationNetwork()
    network.load_state_dict(load_file(path))
    return network.eval().requires_grad_(False)


@torch.inference_mode()
def local_speakers(network: SegmentationNetwork, windows: Tensor) -> np.ndarray:
    """Who speaks in windows float32 [windows, WINDOW_SAMPLES]: bool [windows, frames, 3].

    Speakers are numbered anew in every window.
    """
    speaks = torch.zeros(len(CLASSES), LOCAL_SPEAKERS, dtype=torch.bool)
    for index, speakers in enumerate(CLASSES):
        speaks[index, list(speakers)] = True
    return speaks[network(windows).argmax(-1)].numpy()


def frame_of(seconds: float) -> int:
    """The frame whose middle is nearest."""
    return max(0, round((seconds * SAMPLE_RATE - FRAME_LENGTH / 2) / FRAME_STEP))


def time_of(frame: float) -> float:
    """Seconds of the middle of a frame."""
    return (frame * FRAME_STEP + FRAME_LENGTH / 2) / SAMPLE_RATE


def frames_in(samples: int) -> int:
    """Frames whose middle is in a recording."""
    return max(1, math.ceil((samples - FRAME_LENGTH / 2) / FRAME_STEP))
