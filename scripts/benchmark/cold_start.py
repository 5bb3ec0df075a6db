"""A start from nothing: a process that loads the model, answers once and prints its timings."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.loading import Components, load_components
from scripts.benchmark.bandwidth import memory
from scripts.benchmark.random_models import random_components
from scripts.benchmark.requests import REQUESTS, answer, usual_question
from scripts.benchmark.sizes import SIZES
from scripts.benchmark.timing import synchronize

ROOT = Path(__file__).resolve().parents[2]


class ColdStartError(RuntimeError):
    """The process that was to start from nothing failed; the message is its own."""


def cold_start(
    weights: Path | str,
    audio: Path | None,
    device: torch.device,
    dtype: torch.dtype,
    threads: int,
    quantization: str | None = None,
) -> dict:
    """Seconds from the start of a fresh process to its first spoken answer, by stage.

    ``weights`` is a checkpoint directory, whose files may still be in the operating system's
    cache, or the name of a size, whose random weights are made instead of loaded.
    """
    arguments = {
        "directory": str(weights.resolve()) if isinstance(weights, Path) else None,
        "size": weights if isinstance(weights, str) else None,
        "audio": None if audio is None else str(audio.resolve()),
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": threads,
        "quantization": quantization,
        "started": time.monotonic(),
    }
    command = [sys.executable, "-m", "scripts.benchmark.cold_start", json.dumps(arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise ColdStartError(f"cold start failed: {(done.stderr.splitlines() or ['?'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _components(arguments: dict) -> Components:
    device, dtype = torch.device(arguments["device"]), getattr(torch, arguments["dtype"])
    if arguments["size"] is not None:
        scheme = arguments["quantization"] or "none"
        return random_components(SIZES[arguments["size"]], device, dtype, scheme)
    scheme = arguments["quantization"]
    return load_components(Path(arguments["directory"]), True, device, dtype, quantization=scheme)


def _first_answer(arguments: dict) -> dict:
    """What :func:`cold_start` measures, seen from the inside; all modules are imported by now."""
    times = [arguments["started"], time.monotonic()]
    torch.set_num_threads(arguments["threads"])
    audio = usual_question() if arguments["audio"] is None else Path(arguments["audio"])
    components = _components(arguments)
    synchronize(components.language_model.device)
    times.append(time.monotonic())
    model = KimiAudio.from_components(components, head_rows="track")
    del components  # as in KimiAudio, so that what is not used is freed
    synchronize(model.device)
    times.append(time.monotonic())
    metrics = answer(model, audio, REQUESTS["speech"]).metrics
    times.append(time.monotonic())
    names = ("import", "load", "warm_up", "first_request")
    seconds = {f"{n}_seconds": times[i + 1] - times[i] for i, n in enumerate(names)}
    return {
        "from_files": arguments["directory"] is not None,
        **seconds,
        "total_seconds": times[-1] - times[0],
        "first_request_metrics": metrics,
        "memory": memory(model.device),
    }


if __name__ == "__main__":
    print(json.dumps(_first_answer(json.loads(sys.argv[1]))))
