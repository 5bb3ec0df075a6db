"""Encoders that lie in host memory and come to the device for the sounds of a request only."""

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
def visiting(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Within, the parameters of ``module`` are copies on ``device``; they are not to be changed.

    One visit of a module has to end before the next one begins.
    """
    held = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner.named_parameters(recurse=False)
    ]
    try:
        for owner, name, parameter in held:
            copied = parameter.data.to(device, non_blocking=True)
            setattr(owner, name, nn.Parameter(copied, requires_grad=False))
        yield
    finally:
        for owner, name, parameter in held:
            setattr(owner, name, parameter)


class VisitingSpeechCodes(SpeechCodes):
    """:class:`SpeechCodes` of a module in host memory, computed on ``device``.

    Nothing is recorded: a recording would hold the addresses of parameters that are gone.
    """

    def __init__(self, codes: SpeechCodes, device: torch.device):
        vars(self).update(vars(codes))
        self._device, self._lock = device, threading.Lock()

    def encode(self, wave: np.ndarray | Tensor) -> Tensor:
        with self._lock, visiting(self.module, self._device):
            return super().encode(wave)


class VisitingWhisperFeatures(WhisperFeatures):
    """:class:`WhisperFeatures` of an encoder in host memory, computed on ``device``."""

    def __init__(self, features: WhisperFeatures, device: torch.device):
        vars(self).update(vars(features))
        self._device, self._lock = device, threading.Lock()

    def encode(self, wave: np.ndarray | Tensor) -> Tensor:
        with self._lock, visiting(self.encoder, self._device):
            return super().encode(wave)


def offloaded(
    codes: SpeechCodes, features: WhisperFeatures, device: torch.device
) -> tuple[VisitingSpeechCodes, VisitingWhisperFeatures]:
    """Both encoders, whose modules are in host memory, at work on ``device``."""
    if device.type != "cpu":
        for module in (codes.module, features.encoder):
            for parameter in module.parameters():  # page-locked, from which copies are fastest
                parameter.data = parameter.data.pin_memory()
    return VisitingSpeechCodes(codes, device), VisitingWhisperFeatures(features, device)


def check_offload(value: str, device: torch.device) -> None:
    """Raise ConfigurationError unless ``value`` names what can be kept off ``device``."""
    if value not in OFFLOADS:
        raise ConfigurationError(f"offload: expected {' or '.join(OFFLOADS)}, found {value!r}")
    if device.type == "cpu":
        raise ConfigurationError("offload: the weights are in host memory on the CPU; leave it out")
