"""The process of some measurements: makes them in turn and prints a line of JSON for each."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import threading
import traceback
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.benchmark.runner import MEASUREMENTS, Setup, commit

if TYPE_CHECKING:
    import torch

    from kimia_infer.api.kimia import KimiAudio
    from kimia_infer.api.loading import Components
    from kimia_infer.models.kimi_audio.language_model import LanguageModel


class Bench:
    """What measurements work on, made when one of them first needs it and kept for the others."""

    def __init__(self, setup: Setup):
        import torch

        from kimia_infer.api.loading import default_device, parse_dtype

        self.setup, self.steps, self.runs = setup, setup.steps, setup.runs
        if setup.threads is not None:
            torch.set_num_threads(setup.threads)
        device = torch.device(setup.device) if setup.device else default_device()
        if device.type != "cpu" and device.index is None:
            device = torch.device(device.type, 0)
        self.device = device
        self.dtype = parse_dtype(setup.dtype, self.device)

    @property
    def directory(self) -> Path:
        """The checkpoint. ValueError with random weights."""
        if self.setup.weights is None:
            raise ValueError("random weights have no directory")
        return Path(self.setup.weights)

    @cached_property
    def question(self) -> Path | bytes:
        from scripts.benchmark.requests import usual_question

        return usual_question() if self.setup.audio is None else Path(self.setup.audio)

    def load_language_model(self, quantization: str = "none") -> LanguageModel:
        """Another copy, quantized on the way; the rest of the checkpoint may be missing."""
        from kimia_infer.layers.quantization import quantize_model, quantized_component
        from kimia_infer.models.kimi_audio.language_model import language_model_component
        from scripts.benchmark.random_models import random_language_model
        from scripts.benchmark.sizes import SIZES

        if self.setup.size is not None:
            sizes = SIZES[self.setup.size]
            model = random_language_model(sizes, self.device, self.dtype)
            return quantize_model(model, quantization)
        part = quantized_component(language_model_component(self.directory), quantization)
        return part.load(self.device, self.dtype)

    @cached_property
    def language_model(self) -> LanguageModel:
        """With full heads, which the plain loop reads."""
        from kimia_infer.models.kimi_audio.checkpoint import LAYOUT

        if self.setup.weights is not None and not LAYOUT.missing_files(self.directory):
            return self.components.language_model
        return self.load_language_model()

    def load_components(self, quantization: str = "none") -> Components:
        """All components of another copy."""
        from kimia_infer.api.loading import load_components
        from scripts.benchmark.random_models import random_components
        from scripts.benchmark.sizes import SIZES

        if self.setup.size is not None:
            return random_components(SIZES[self.setup.size], self.device, self.dtype, quantization)
        scheme = None if quantization == "none" else quantization
        return load_components(self.directory, True, self.device, self.dtype, quantization=scheme)

    @cached_property
    def components(self) -> Components:
        from scripts.benchmark.random_models import random_components
        from scripts.benchmark.sizes import SIZES

        if self.setup.size is None:
            return self.load_components()
        sizes, model = SIZES[self.setup.size], self.language_model
        return random_components(sizes, self.device, self.dtype, language_model=model)

    @cached_property
    def model(self) -> KimiAudio:
        from kimia_infer.api.kimia import KimiAudio

        return KimiAudio.from_components(self.components, head_rows="track")

    def about(self) -> dict[str, Any]:
        """What runs where."""
        import torch

        setup = self.setup
        return {
            "date": datetime.date.today().isoformat(),
            "commit": commit(),
            "model": f"random, {setup.size} size" if setup.size else str(setup.weights),
            "device": f"{self.device}, {device_name(self.device)}",
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "software": f"torch {torch.__version__}, Python {platform.python_version()}",
        }


def device_name(device: torch.device) -> str:
    """The card with its driver and clock, or the processor."""
    if device.type == "cuda":
        fields = "name,driver_version,memory.total,clocks.max.sm"
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        try:
            lines = subprocess.check_output(command, text=True).splitlines()
            return f"{lines[device.index or 0]} (card, driver, memory, clock)"
        except (OSError, subprocess.SubprocessError, IndexError):
            pass
    if device.type != "cpu":
        import torch

        return torch.get_device_module(device).get_device_name(device)
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def measure(bench: Bench, name: str) -> dict[str, Any]:
    """The tables of a measurement, or the error that it ended with."""
    measurement = MEASUREMENTS[name]
    try:
        from scripts.benchmark import measurements

        tables = getattr(measurements, measurement.run)(bench, *measurement.arguments)
        return {"tables": [asdict(table) for table in tables]}
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        return {"error": text.splitlines()[0], "traceback": traceback.format_exc()}


def end_with_parent() -> None:
    """Wait for the end of stdin, which the parent holds open, and exit."""
    sys.stdin.read()
    os._exit(1)


def main() -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    # Whatever else is printed goes to stderr.
    reports = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def send(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=reports, flush=True)

    asked = json.loads(sys.argv[1])
    try:
        bench = Bench(Setup(**asked["setup"]))
        send(bench.about())
    except Exception as error:
        send({"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()})
        return
    for name in asked["names"]:
        found = measure(bench, name)
        send(found)
        if "error" in found:  # the device may be unusable from here on
            return


if __name__ == "__main__":
    main()
