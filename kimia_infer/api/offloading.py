"""Encoders that stay in host memory and are copied to the device for each recording."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from kimia_infer.models.kimi_audio.speech_tokenizer import SpeechCodes
from kimia_infer.models.kimi_audio.whisper import WhisperFeatures
from kimia_infer.utils.errors import ConfigurationError

OFFLOADS = ("encoders",)
ENCODERS = ("speech_tokenizer", "whisper")
"""The components that ``offload="encoders"`` keeps in host memory."""


@contextmanager
def copied_to(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Within the block, the parameters of ``module`` are copies on ``device``; do not change them.

    Only one thread at a time may do this with a module.
    """
    parameters = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner.named_parameters(recurse=False)
    ]
    try:
        for owner, name, parameter in parameters:
            copied = parameter.data.to(device, non_blocking=True)
            setattr(owner, name, nn.Parameter(copied, requires_grad=False))
        yield
    finally:
        for owner, name, parameter in parameters:
            setattr(owner, name, parameter)


class OffloadedSpeechCodes(SpeechCodes):
    """:class:`SpeechCodes` of a module in host memory, computed on ``device``.

    It is not recorded as a graph, which would keep the addresses of the copied parameters.
    """

    def __init__(self, codes: SpeechCodes, device: torch.device):
        vars(self).update(vars(codes))
        self._device, self._lock = device, threading.Lock()

    def encode(self, wave: np.ndarray | Tensor) -> Tensor:
        with self._lock, copied_to(self.module, self._device):
            return super().encode(wave)


class OffloadedWhisperFeatures(WhisperFeatures):
    """:class:`WhisperFeatures` of an encoder in host memory, computed on ``device``."""

    def __init__(self, features: WhisperFeatures, device: torch.device):
        vars(self).update(vars(features))
        self._device, self._lock = device, threading.Lock()

    def encode(self, wave: np.ndarray | Tensor) -> Tensor:
        with self._lock, copied_to(self.encoder, self._device):
            return super().encode(wave)


def offloaded(
    codes: SpeechCodes, features: WhisperFeatures, device: torch.device
) -> tuple[OffloadedSpeechCodes, OffloadedWhisperFeatures]:
    """Both encoders, whose modules are in host memory, computing on ``device``."""
    if device.type != "cpu":
        for module in (codes.module, features.encoder):
            for parameter in module.parameters():  # page-locked memory is copied fastest
                parameter.data = parameter.data.pin_memory()
    return OffloadedSpeechCodes(codes, device), OffloadedWhisperFeatures(features, device)


def check_offload(value: str, device: torch.device) -> None:
    """Raise ConfigurationError unless ``value`` names what can be kept in host memory."""
    if value not in OFFLOADS:
        raise ConfigurationError(f"offload: expected {' or '.join(OFFLOADS)}, found {value!r}")
    if device.type == "cpu":
        raise ConfigurationError("offload: the weights are in host memory on the CPU; leave it out")
