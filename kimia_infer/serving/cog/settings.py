"""How the model runs, from environment variables."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from kimia_infer.api.offloading import OFFLOADS
from kimia_infer.layers.attention import BACKENDS, KV_CACHES
from kimia_infer.layers.quantization import SCHEMES

DTYPES = ("float32", "bfloat16")
HEAD_ROWS = ("track", "full")
OUTPUTS = ("text", "both")


class SettingsError(ValueError):
    """A variable has a value that cannot be used; the message names it and what can."""


@dataclass(frozen=True)
class Settings:
    """None leaves the choice to KimiAudio; ``timeout`` is in seconds, None for no limit.

    ``adapter`` is the directory of an adapter, None without. With ``output`` "text" no detokenizer
    is loaded, and nothing can be spoken.
    """

    device: str | None = None
    dtype: str | None = None
    head_rows: str = "track"
    attention: str | None = None
    timeout: float | None = None
    adapter: str | None = None
    quantization: str | None = None
    kv_cache: str | None = None
    offload: str | None = None
    output: str = "both"


def read_settings(environment: Mapping[str, str]) -> Settings:
    """The settings that variables ``KIMI_AUDIO_*`` ask for; unset and empty mean the default.

    Raises:
        SettingsError: naming the variable, its value and the choices.
    """
    return Settings(
        device=_device(environment.get("KIMI_AUDIO_DEVICE")),
        dtype=_choice(environment, "KIMI_AUDIO_DTYPE", DTYPES),
        head_rows=_choice(environment, "KIMI_AUDIO_HEAD_ROWS", HEAD_ROWS) or "track",
        attention=_choice(environment, "KIMI_AUDIO_ATTENTION", tuple(BACKENDS)),
        timeout=_seconds(environment, "KIMI_AUDIO_TIMEOUT"),
        adapter=_directory(environment, "KIMI_AUDIO_ADAPTER"),
        quantization=_choice(environment, "KIMI_AUDIO_QUANTIZATION", SCHEMES),
        kv_cache=_choice(environment, "KIMI_AUDIO_KV_CACHE", tuple(KV_CACHES)),
        offload=_choice(environment, "KIMI_AUDIO_OFFLOAD", OFFLOADS),
        output=_choice(environment, "KIMI_AUDIO_OUTPUT", OUTPUTS) or "both",
    )


def _choice(environment: Mapping[str, str], name: str, choices: tuple[str, ...]) -> str | None:
    value = environment.get(name)
    if value and value not in choices:
        raise SettingsError(f"{name}: expected {' or '.join(choices)}, found {value!r}")
    return value or None


def _seconds(environment: Mapping[str, str], name: str) -> float | None:
    value = environment.get(name)
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise SettingsError(f"{name}: expected a number of seconds above 0, found {value!r}")
    return seconds


def _directory(environment: Mapping[str, str], name: str) -> str | None:
    value = environment.get(name)
    if value and not os.path.isdir(value):
        raise SettingsError(f"{name}: {value!r} is not a directory here")
    return value or None


def _device(value: str | None) -> str | None:
    if not value:
        return None
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    known = ["cpu"]
    if accelerator is not None:
        count = torch.accelerator.device_count()
        known += [accelerator.type, *(f"{accelerator.type}:{i}" for i in range(count))]
    if value not in known:
        raise SettingsError(
            f"KIMI_AUDIO_DEVICE: PyTorch finds {', '.join(known)} here, not {value!r}"
        )
    return value
