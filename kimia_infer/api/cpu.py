"""How a model is served on a CPU: its quantization, dtype and memory."""

from __future__ import annotations

import logging
import os
from functools import cache
from pathlib import Path

import torch

from kimia_infer.api.memory import GB, MemoryPlan, language_model_bytes, weight_bytes
from kimia_infer.layers.operators import has_bfloat16
from kimia_infer.layers.packed import PACKED, missing
from kimia_infer.layers.quantization import stored_scheme
from kimia_infer.models.kimi_audio.config import LanguageModelConfig
from kimia_infer.models.kimi_audio.packing import mapped_language_model
from kimia_infer.utils.errors import ConfigurationError

log = logging.getLogger(__name__)

LARGE = 4 * GB
"""Bytes of a language model in bfloat16 from which a CPU quantizes it if nothing else is asked for.
A step reads them all: at 20 GB/s there are five steps a second."""

CPU = torch.device("cpu")


def choose_for_cpu(
    directory: Path, dtype: torch.dtype | None, quantization: str | None
) -> tuple[torch.dtype, str | None]:
    """What is not given of ``dtype`` and ``quantization`` of the checkpoint in ``directory``.

    A model of LARGE bytes is int4, if it is stored unquantized and the extra ``cpu`` is installed,
    and bfloat16 on processors that multiply it; all others are float32 and as stored.
    """
    config, stored = LanguageModelConfig.from_directory(directory), stored_scheme(directory)
    large = language_model_bytes(config, "none", torch.bfloat16) >= LARGE
    asked = quantization
    if asked is None and stored == "none" and large and missing() is None:
        quantization = "int4"
    half = has_bfloat16(CPU)
    chosen = dtype or (torch.bfloat16 if large and half else torch.float32)
    size = "large" if large else "small"
    feature = "with" if half else "without"
    log.info(
        "On this CPU: quantization %s (%s), %s (%s), %d threads (%s)",
        quantization or stored,
        "as asked" if asked else "as stored" if stored != "none" else f"for a {size} model",
        str(chosen).removeprefix("torch."),
        "as asked" if dtype else f"a {size} model, {feature} instructions for bfloat16",
        torch.get_num_threads(),
        "OMP_NUM_THREADS" if "OMP_NUM_THREADS" in os.environ else "one for each core",
    )
    return chosen, quantization


def check_host(plan: MemoryPlan, scheme: str, speech: bool, mapped: bool, free: int) -> None:
    """Refuse a model that does not fit in the ``free`` bytes of RAM, before anything is loaded.

    ``mapped`` says whether the checkpoint is packed for a CPU.

    Raises:
        ConfigurationError: naming what is needed, what is free, and what would fit.
    """
    needed = host_bytes(plan, scheme, speech, mapped)
    if needed <= free:
        return
    others = [(scheme, speech)] if mapped else [(other, speech) for other in PACKED]
    others += [(other, False) for other, _ in others]
    fitting = (
        f"quantization {other!r} with {_output(spoken)} ({size / GB:.1f} GB)"
        for other, spoken in others
        if (size := host_bytes(plan, other, spoken, mapped)) <= free
    )
    advice = next((f"use {text}" for text in fitting), "close other programs; nothing smaller fits")
    raise ConfigurationError(
        f"memory: quantization {scheme!r} with {_output(speech)} needs {needed / GB:.1f} GB of "
        f"RAM, where {free / GB:.1f} GB are available; {advice}"
    )


def _output(speech: bool) -> str:
    alone = "text alone (load_detokenizer=False, in a service KIMI_AUDIO_OUTPUT=text)"
    return "text and speech" if speech else alone


def host_bytes(plan: MemoryPlan, scheme: str, speech: bool, mapped: bool) -> int:
    """Bytes of RAM for one request at a time, in all but what is mapped and not used."""
    whole = plan.needed(scheme, speech)[plan.device]
    if scheme not in PACKED or missing() is not None:
        return whole
    expanded = language_model_bytes(plan.config, scheme, plan.dtype)
    reading = plan.reading_bytes(scheme) - plan.reading_bytes("none")
    return (
        whole - expanded - reading + packed_bytes(plan.config, scheme, plan.dtype, speech, mapped)
    )


@cache
def packed_bytes(
    config: LanguageModelConfig, scheme: str, dtype: torch.dtype, speech: bool, mapped: bool
) -> int:
    """Bytes of a language model as a CPU reads it; ``mapped`` without its embedding.

    Mapped layers of the audio track take nothing where there is no ``speech``.
    """
    with torch.device("meta"):
        model = mapped_language_model(config, scheme)()
    unused = [model.embedding] if mapped else []
    if mapped and not speech:
        unused += [model.mimo_layers, model.audio_head]
    return weight_bytes(model, dtype) - sum(weight_bytes(part, dtype) for part in unused)


def available_memory() -> int:
    """Bytes of RAM that programs can have; where the system does not tell, all there is.

    A container with a memory limit (control groups, version 2) can have what is left of it.
    """
    path = Path("/proc/meminfo")
    if not path.is_file():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fields = dict(line.split(":") for line in path.read_text().splitlines())
    return min([1024 * int(fields["MemAvailable"].split()[0]), *left_of_limits()])


def left_of_limits(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> list[int]:
    """What is left of the memory limits of the control group named in ``own``, and of its parents.

    Cached files, which are counted as used, are given up for programs; shared memory, which is
    counted with them, is not.
    """
    lines = own.read_text().splitlines() if own.is_file() else []
    name = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    group, left = root / name, []
    for folder in (group, *group.parents):
        if not folder.is_relative_to(root) or not (folder / "memory.max").is_file():
            continue
        limit = (folder / "memory.max").read_text().strip()
        if limit != "max":
            lines = (folder / "memory.stat").read_text().splitlines()
            parts = {name: int(size) for name, size in (line.split() for line in lines)}
            used = int((folder / "memory.current").read_text()) - parts["file"] + parts["shmem"]
            left.append(max(0, int(limit) - used))
    return left
