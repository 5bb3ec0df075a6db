"""What was recorded of the published implementation; see the README of the recording."""

from __future__ import annotations

import functools
import json
import wave
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.paths import GOLDEN

RECORDED = GOLDEN / "editx"
WAVES = ("w16k", "w24k_stereo")


@functools.cache
def tensors(name: str) -> dict[str, Tensor]:
    return load_file(RECORDED / f"{name}.safetensors")


def values(name: str) -> Any:
    return json.loads((RECORDED / f"{name}.json").read_text())


def recording(name: str) -> tuple[Tensor, int]:
    """The samples of one of WAVES, mixed to one channel, and their rate."""
    with wave.open(str(RECORDED / f"{name}.wav")) as file:
        pcm = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        samples = pcm.reshape(-1, file.getnchannels()).astype(np.float32) / 32768
        return torch.from_numpy(samples.mean(1)), file.getframerate()


def sinusoids(length: int, channels: int) -> Tensor:
    """Whisper's table of positions [length, channels], which the recording leaves out."""
    steps = -np.log(10_000) / (channels // 2 - 1) * torch.arange(channels // 2)
    angles = torch.arange(length)[:, None] * torch.exp(steps)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sizes() -> dict[str, Any]:
    """The sections ``flow`` and ``hift`` as ``cosyvoice.yaml`` has them."""
    recorded = values("flow_config")
    flow, hift = recorded["flow"], recorded["hift"]
    decoder = {"inference_cfg_rate": flow["cfg_rate"], "estimator": flow["dit"]}
    given = {name: value for name, value in flow.items() if name not in ("dit", "cfg_rate")}
    return {
        "flow": given | {"decoder": decoder},
        "hift": hift | {"f0_predictor": recorded["f0_predictor"]},
    }
