"""What measurements work on, loaded when one of them first needs it and kept for the others."""

from __future__ import annotations

import datetime
import platform
import subprocess
from functools import cached_property
from pathlib import Path

import torch

from kimia_infer.api.devices import parse_device, parse_dtype
from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.loading import Components, load_components
from kimia_infer.layers.quantization import quantize_model, quantized_component, stored_scheme
from kimia_infer.models.kimi_audio.checkpoint import LAYOUT
from kimia_infer.models.kimi_audio.language_model import LanguageModel, language_model_component
from scripts.benchmark.random_models import random_components, random_language_model
from scripts.benchmark.requests import default_question
from scripts.benchmark.runner import ROOT, Advance, Setup
from scripts.benchmark.sizes import SIZES

CLIENTS = {False: (1, 2, 4, 8), True: (1, 2, 4, 8, 16, 32)}
"""Clients at a time, on a CPU and on an accelerator."""


class Bench:
    """``advance`` is called with what is done of a measurement and how much there is."""

    def __init__(self, setup: Setup, advance: Advance = lambda done, of: None):
        self.advance = advance
        self.setup, self.steps, self.runs = setup, setup.steps, setup.runs
        self.sizes = SIZES[setup.size or "mid"]
        self.directory = Path(setup.weights or "")
        if setup.threads is not None:
            torch.set_num_threads(setup.threads)
        device = parse_device(setup.device)
        if device.type != "cpu" and device.index is None:
            device = torch.device(device.type, 0)
        self.device = device
        self.dtype = parse_dtype(setup.dtype, device)
        self.clients = setup.clients or CLIENTS[device.type != "cpu"]
        self.question = Path(setup.audio) if setup.audio else default_question()

    def load_language_model(self, quantization: str = "none") -> LanguageModel:
        """Another copy, quantized while it is loaded; other components may be missing."""
        if self.setup.weights is None:
            model = random_language_model(self.sizes, self.device, self.dtype)
            return quantize_model(model, quantization)
        component = quantized_component(language_model_component(self.directory), quantization)
        return component.load(self.device, self.dtype)

    def load_components(self, quantization: str = "none") -> Components:
        """Another copy of all components."""
        if self.setup.weights is None:
            return random_components(self.sizes, self.device, self.dtype, quantization)
        scheme = stored_scheme(self.directory) if quantization == "none" else quantization
        return load_components(self.directory, True, self.device, self.dtype, quantization=scheme)

    @cached_property
    def language_model(self) -> LanguageModel:
        """With full heads, which the plain loop reads."""
        complete = self.setup.weights is not None and not LAYOUT.missing_files(self.directory)
        return self.components.language_model if complete else self.load_language_model()

    @cached_property
    def components(self) -> Components:
        if self.setup.weights is not None:
            return self.load_components()
        model = self.language_model
        return random_components(self.sizes, self.device, self.dtype, language_model=model)

    @cached_property
    def model(self) -> KimiAudio:
        return KimiAudio.from_components(self.components, head_rows="track")

    def about(self) -> dict[str, str | int]:
        """The machine, the software and the model."""
        setup = self.setup
        model = f"random, {setup.size} size" if setup.size else setup.weights or setup.server
        return {
            "date": datetime.date.today().isoformat(),
            "commit": commit(),
            "model": str(model),
            "device": f"{self.device}, {device_name(self.device)}",
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "software": f"torch {torch.__version__}, Python {platform.python_version()}",
        }


def output_of(*command: str) -> str | None:
    """What a command prints; None if it is missing or fails."""
    try:
        return subprocess.check_output(
            command, cwd=ROOT, stderr=subprocess.DEVNULL, text=True
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def commit() -> str:
    # The checkout may belong to another user, as in a container.
    command = ("git", "-c", "safe.directory=*", "describe", "--always", "--dirty")
    return output_of(*command) or "unknown"


def device_name(device: torch.device) -> str:
    """The card with its driver and clock, or the processor."""
    if device.type == "cuda":
        fields = "name,driver_version,memory.total,clocks.max.sm"
        card = f"--id={device.index or 0}"
        if line := output_of("nvidia-smi", card, f"--query-gpu={fields}", "--format=csv,noheader"):
            return f"{line} (card, driver, memory, clock)"
    if device.type != "cpu":
        return torch.get_device_module(device).get_device_name(device)
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
