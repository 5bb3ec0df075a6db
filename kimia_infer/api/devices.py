"""The devices that PyTorch can use here, and the dtype of weights on them."""

from __future__ import annotations

from typing import Any

import torch

from kimia_infer.utils.errors import ConfigurationError


def default_device() -> torch.device:
    """The accelerator that PyTorch reports, else the CPU; MPS has to be named explicitly."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or accelerator.type == "mps":
        return torch.device("cpu")
    return accelerator


def available_devices() -> list[str]:
    """The names of the devices that PyTorch can use here: ``cpu``, ``cuda``, ``cuda:0``, ..."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return ["cpu"]
    indexed = (f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count()))
    return ["cpu", accelerator.type, *indexed]


def parse_device(value: str | torch.device | None, name: str = "device") -> torch.device:
    """A device by value or name, with its index; None is :func:`default_device`.

    Raises ConfigurationError, which begins with ``name``, for a device that is not there, and for
    what is no device.
    """
    if value is None:
        value = default_device()
    known = available_devices()
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError):
        device = None
    if device is not None and device.type == "cpu" and not device.index:  # also cpu:0
        return torch.device("cpu")
    if device is None or str(device) not in known:
        raise ConfigurationError(
            f"{name}: expected one of the devices here ({', '.join(known)}), found "
            f"{str(value)[:60]!r}"
        )
    if device.index is None:
        return torch.device(device.type, torch.accelerator.current_device_index())
    return device


def parse_dtype(value: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """A dtype by value or name; None is float32 on the CPU and bfloat16 elsewhere.

    Raises ConfigurationError for any other dtype than those two.
    """
    if value is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype: Any = getattr(torch, value, None) if isinstance(value, str) else value
    if dtype not in (torch.float32, torch.bfloat16):
        raise ConfigurationError(f"dtype: expected 'float32' or 'bfloat16', found {value!r}")
    return dtype
