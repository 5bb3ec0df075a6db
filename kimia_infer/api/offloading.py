"""Encoders that stay in host memory and are copied to the device for each recording."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from kimia_infer.models.kimi_audio.encoders import SegmentEncoder
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


def offload(encoder: SegmentEncoder, device: torch.device) -> None:
    """Let ``encoder``, whose module is in host memory, compute on ``device``.

    It is not recorded as a graph, which would keep the addresses of the copied parameters.
    """
    if device.type != "cpu":
        for parameter in encoder.module.parameters():  # page-locked memory is copied fastest
            parameter.data = parameter.data.pin_memory()

    @contextmanager
    def placed() -> Iterator[None]:
        with copied_to(encoder.module, device):
            yield

    encoder.placed = placed


def check_offload(value: str, device: torch.device) -> None:
    """Raise ConfigurationError unless ``value`` names what can be kept in host memory."""
    if value not in OFFLOADS:
        raise ConfigurationError(f"offload: expected {' or '.join(OFFLOADS)}, found {value!r}")
    if device.type == "cpu":
        raise ConfigurationError("offload: the weights are in host memory on the CPU; leave it out")
