"""Seconds on a device, bytes that a decode step has to read, and how fast they can be moved."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from kimia_infer.engine import decode
from kimia_infer.layers.packed import PackedLinear
from kimia_infer.models.kimi_audio.language_model import LanguageModel

MODES = {"text only": decode.TEXT, "both tracks": decode.BOTH, "after text end": decode.AUDIO}
"""What a decode step computes, by name."""
BOTH = "both tracks"

MOST_RAM = "RAM at most, GB"
COPIES = 10


def synchronize(device: torch.device) -> None:
    """Wait for what was launched on an accelerator."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@torch.inference_mode()
def medians(
    actions: Sequence[Callable[[], object]], runs: int, device: torch.device
) -> list[float]:
    """Median seconds of each action over interleaved runs, after a warm-up."""
    seconds: list[list[float]] = [[] for _ in actions]
    for run in range(runs + 1):
        for action, values in zip(actions, seconds, strict=True):
            synchronize(device)
            start = time.perf_counter()
            action()
            synchronize(device)
            if run > 0:
                values.append(time.perf_counter() - start)
    return [statistics.median(values) for values in seconds]


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of the best of several large copies, bytes read plus bytes written.

    Other work on the machine makes a copy slower, never faster.
    """
    size = 2**29 if device.type == "cpu" else 2**31  # larger than every cache
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


def step_bytes(
    model: LanguageModel, mode: str, filled: float, cache_dtype: torch.dtype | None = None
) -> int:
    """Bytes that a decode step with ``filled`` cache positions has to read, each once.

    Weights of the layers, norms and heads of ``mode``, the two rows of the embedding, and keys
    and values of the filled positions.
    """
    config, tracks = model.config, MODES[mode]
    layers = list(model.layers[: config.trunk_layers if tracks.text else config.fork_layer + 1])
    rest: list[nn.Module] = []
    if tracks.text:
        rest += [model.norm, model.text_head]
    if tracks.audio:
        layers += model.mimo_layers
        rest += [model.mimo_norm, model.audio_head]
    weights = sum(map(parameter_bytes, (*layers, *rest)))
    cache = len(layers) * 2 * config.kv_heads * config.head_dim * filled
    embedding = 2 * config.hidden_size * model.dtype.itemsize
    return weights + embedding + round((cache_dtype or model.dtype).itemsize * cache)


def process_memory(process: int) -> dict[str, float]:
    """GB of RAM at most, of the largest of a process and those below it; where /proc tells."""
    statuses = [process_status(path.name) for path in Path("/proc").glob("[0-9]*")]
    members = {str(process)}
    for _ in statuses:  # a process may come before the one that started it
        members |= {status["Pid"] for status in statuses if status.get("PPid") in members}
    sizes = [
        1024 * int(status["VmHWM"].split()[0])
        for status in statuses
        if status.get("Pid") in members and "VmHWM" in status
    ]
    return {MOST_RAM: max(sizes) / 1e9} if sizes else {}


def process_status(process: str) -> dict[str, str]:
    """Fields of /proc/PROCESS/status; none where there is no such file."""
    try:
        lines = Path("/proc", process, "status").read_text().splitlines()
    except OSError:  # also of a process that has just ended
        return {}
    pairs = (line.partition(":") for line in lines)
    return {name: value.strip() for name, _, value in pairs}


def parameter_bytes(module: nn.Module) -> int:
    packed = (layer for layer in module.modules() if isinstance(layer, PackedLinear))
    return sum(p.nbytes for p in module.parameters()) + sum(layer.bytes for layer in packed)


def memory(device: torch.device) -> dict[str, float]:
    """GB in use and at most: in RAM, where /proc tells; on an accelerator as PyTorch counts it.

    ``reserved`` is what PyTorch took from the device, recorded graphs included.
    """
    found = {
        name: 1024 * int(size.split()[0])
        for name, field in (("RAM, GB", "VmRSS"), (MOST_RAM, "VmHWM"))
        if (size := process_status("self").get(field)) is not None
    }
    if device.type != "cpu":
        found["allocated, GB"] = torch.accelerator.memory_allocated(device)
        found["allocated at most, GB"] = torch.accelerator.max_memory_allocated(device)
        found["reserved at most, GB"] = torch.accelerator.max_memory_reserved(device)
    return {name: value / 1e9 for name, value in found.items()}
