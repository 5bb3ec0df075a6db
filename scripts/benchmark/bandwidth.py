"""What limits a decode step: bytes it has to read, and how fast the machine moves bytes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from kimia_infer.engine import state
from kimia_infer.engine.state import Tracks
from kimia_infer.models.kimi_audio.language_model import LanguageModel
from scripts.benchmark.timing import synchronize

# Beyond every cache; two of them are held.
COPY_BYTES = {"cpu": 512 * 2**20}
ACCELERATOR_COPY_BYTES = 2 * 2**30
COPIES = 10


@dataclass(frozen=True)
class Mode:
    """Which tracks a step computes."""

    name: str
    tracks: Tracks


TEXT = Mode("text only", state.TEXT)
BOTH = Mode("both tracks", state.BOTH)
AFTER_TEXT = Mode("after text end", state.AUDIO)
MODES = (TEXT, BOTH, AFTER_TEXT)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of the best of several large copies, those read plus those written."""
    size = COPY_BYTES.get(device.type, ACCELERATOR_COPY_BYTES)
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(COPIES + 1):  # the first one touches the memory
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size / best


def step_bytes(model: LanguageModel, mode: Mode, filled: float) -> int:
    """Bytes that a decode step with ``filled`` cache positions has to read, each once.

    Weights of the layers, norms and heads of ``mode``, the two rows of the embedding, and keys
    and values of the filled positions.
    """
    config, tracks = model.config, mode.tracks
    layers = list(model.layers[: config.trunk_layers if tracks.text else config.fork_layer + 1])
    rest: list[nn.Module] = []
    if tracks.text:
        rest += [model.norm, model.text_head]
    if tracks.audio:
        layers += model.mimo_layers
        rest += [model.mimo_norm, model.audio_head]
    weights = sum(p.nbytes for module in (*layers, *rest) for p in module.parameters())
    cache = len(layers) * 2 * config.kv_heads * config.head_dim * filled
    return weights + round(model.dtype.itemsize * (2 * config.hidden_size + cache))


def resident_bytes(peak: bool = False) -> int | None:
    """Memory of this process that is in RAM, at most so far or at present; None without /proc."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    field = "VmHWM:" if peak else "VmRSS:"
    lines = [line.split() for line in status.read_text().splitlines()]
    return next(1024 * int(words[1]) for words in lines if words[0] == field)


def memory(device: torch.device) -> dict[str, int | None]:
    """Bytes in use and at most: in RAM; of an accelerator, by PyTorch's own account.

    There ``reserved`` is what PyTorch took from the device, recorded graphs included.
    """
    found = {"resident": resident_bytes(), "peak_resident": resident_bytes(peak=True)}
    if device.type != "cpu":
        found["allocated"] = torch.accelerator.memory_allocated(device)
        found["peak_allocated"] = torch.accelerator.max_memory_allocated(device)
        found["peak_reserved"] = torch.accelerator.max_memory_reserved(device)
    return found
