"""Check all components of a checkpoint together, load them, and warm them up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kimia_infer.api.cpu import CPU, available_memory, check_host, choose_for_cpu
from kimia_infer.api.devices import parse_dtype
from kimia_infer.api.memory import (
    DEFAULT_CAPACITY,
    Capacity,
    MemoryPlan,
    SpeechSizes,
    free_memory,
)
from kimia_infer.api.offloading import ENCODERS
from kimia_infer.api.offloading import offload as offload_encoder
from kimia_infer.api.transcription import longest_segment
from kimia_infer.audio.split import LONGEST_SECONDS
from kimia_infer.layers.quantization import (
    check_quantization,
    quantized_component,
    stored_scheme,
)
from kimia_infer.models.kimi_audio.checkpoint import (
    SPEECH_TOKENIZER_FOLDER,
    VOCODER_FOLDER,
    WHISPER_FOLDER,
    checkpoint_layout,
)
from kimia_infer.models.kimi_audio.components import (
    StoredComponents,
    checked_text_tokenizer,
    checkpoint_components,
)
from kimia_infer.models.kimi_audio.config import LanguageModelConfig
from kimia_infer.models.kimi_audio.detokenizer import Detokenizer
from kimia_infer.models.kimi_audio.encoders import SpeechCodes, WhisperFeatures
from kimia_infer.models.kimi_audio.language_model import LanguageModel
from kimia_infer.models.kimi_audio.packing import open_packed
from kimia_infer.models.kimi_audio.text_tokenizer import TextTokenizer
from kimia_infer.utils.errors import CheckpointError, ConfigurationError
from kimia_infer.utils.progress import progress
from kimia_infer.weights.adapter import Adapter
from kimia_infer.weights.component import Component
from kimia_infer.weights.manifest import MANIFEST_NAME, CheckpointManifest, read_checkpoint_manifest
from kimia_infer.weights.parallel import load_modules
from kimia_infer.weights.tensors import StoredTensor


@dataclass
class Components:
    """The loaded components of a model; without ``detokenizer`` it answers in text only.

    ``vocoder_folder`` holds the ``config.json`` with which reference voices are read.
    ``adapter`` is the directory of the adapter that was added to the weights. ``offload`` names
    what stays in host memory. Encoders and detokenizer compute on ``speech_device``, None for the
    device of the language model. Recordings are transcribed in segments of at most
    ``segment_seconds``.
    """

    text_tokenizer: TextTokenizer
    speech_tokenizer: SpeechCodes
    whisper: WhisperFeatures
    language_model: LanguageModel
    detokenizer: Detokenizer | None = None
    vocoder_folder: Path | None = None
    adapter: Path | None = None
    segment_seconds: float = LONGEST_SECONDS
    offload: str | None = None
    speech_device: torch.device | None = None
    capacity: Capacity = DEFAULT_CAPACITY

    def warm_up(self) -> None:
        """Record what encoders and speech need, so that nothing is recorded in a request."""
        self.speech_tokenizer.warm_up()
        self.whisper.warm_up()
        if self.detokenizer is not None:
            self.detokenizer.warm_up()


def load_components(
    directory: Path,
    detokenizer: bool,
    device: torch.device,
    dtype: torch.dtype | None,
    adapter: Path | None = None,
    quantization: str | None = None,
    kv_cache: str | None = None,
    offload: str | None = None,
    slots: int | None = None,
    speech_device: torch.device | None = None,
    reserved: int = 0,
) -> Components:
    """Load a checkpoint directory with a progress bar.

    A slim checkpoint is verified by its manifest: file sizes, configurations and headers before
    any weight is read, every tensor while it is read.

    Args:
        directory: a complete checkpoint.
        detokenizer: whether the components for speech output are loaded.
        device: where the language model computes.
        dtype: of all components but the speech tokenizer, which stays in float32; None: what suits
            a CPU (:mod:`kimia_infer.api.cpu`), elsewhere bfloat16.
        adapter: directory of an adapter that is added to the weights.
        quantization: one of ``SCHEMES``; None: as the weights are stored, or as suits a CPU.
        kv_cache: one of ``KV_CACHES``, what requests will use; None: "none".
        offload: "encoders" copies both encoders from host memory for each recording.
        slots: requests at a time; None: what fits, on the CPU HOST_SLOTS.
        speech_device: where encoders, detokenizer and vocoder compute; None: on ``device``.
        reserved: bytes that stay free there for what else computes on it.

    Raises:
        CheckpointError: the first file or tensor that does not fit.
        ConfigurationError: the quantization cannot be used here, or too little memory is free.
    """
    devices = device, speech_device or device
    slim = _checked_manifest(directory, detokenizer)
    dtype, scheme = _choose(directory, device, dtype, quantization, adapter)
    change = Adapter.read(adapter) if adapter is not None else None
    segment_seconds = longest_segment(directory)
    text_tokenizer = checked_text_tokenizer(directory)
    stored = checkpoint_components(directory, detokenizer, quantized=True)
    plan = memory_plan(directory, stored, dtype, kv_cache or "none", offload is not None, devices)
    packed = slim is not None and slim.packed
    _check_devices(directory, plan, scheme, detokenizer, packed)
    capacity = plan.check(scheme, detokenizer, _free(devices, reserved), slots)
    stored = _changed(stored, change, None if scheme == plan.stored else scheme)
    checksum = partial(slim.checksum, directory) if slim is not None else None
    modules = _load(stored, devices, dtype, checksum, offload, directory if packed else None)
    codes = SpeechCodes(modules["speech_tokenizer"], directory / SPEECH_TOKENIZER_FOLDER)
    features = WhisperFeatures(modules["whisper"], directory / WHISPER_FOLDER)
    spoken = None
    if detokenizer:
        spoken = Detokenizer(modules["dit"], modules["vocoder"], streams=capacity.slots)
    for encoder in (codes, features) if offload is not None else ():
        offload_encoder(encoder, devices[1])
    return Components(
        text_tokenizer,
        codes,
        features,
        modules["language_model"],
        spoken,
        directory / VOCODER_FOLDER if detokenizer else None,
        adapter,
        segment_seconds,
        offload,
        devices[1],
        capacity,
    )


def _choose(
    directory: Path,
    device: torch.device,
    dtype: torch.dtype | None,
    quantization: str | None,
    adapter: Path | None,
) -> tuple[torch.dtype, str]:
    """The dtype and the quantization that a model gets."""
    if device == CPU:
        dtype, quantization = choose_for_cpu(directory, dtype, quantization)
    scheme = choose_scheme(directory, quantization, adapter)
    check_quantization(scheme, device, stored_scheme(directory))
    return dtype or parse_dtype(None, device), scheme


def _checked_manifest(directory: Path, detokenizer: bool) -> CheckpointManifest | None:
    """The manifest of a slim checkpoint whose files are as it says; None without one."""
    slim = read_checkpoint_manifest(directory / MANIFEST_NAME)
    if slim is not None:
        slim.check(directory, checkpoint_layout(detokenizer).skipped)
    return slim


def _check_devices(
    directory: Path, plan: MemoryPlan, scheme: str, speech: bool, packed: bool
) -> None:
    """Raise ConfigurationError for a checkpoint of a CPU elsewhere, and for too little RAM."""
    devices = {plan.device, plan.speech_device}
    if packed and devices != {CPU}:
        raise ConfigurationError(
            f"device: {directory} is prepared for a CPU, not for {plan.device}; use the checkpoint "
            "that it was made from"
        )
    if devices == {CPU}:
        check_host(plan, scheme, speech, packed, available_memory())


def _free(devices: tuple[torch.device, torch.device], reserved: int) -> dict[torch.device, int]:
    """Free bytes of the devices, without those that are reserved on the second."""
    free = free_memory(set(devices))
    return {device: size - reserved * (device == devices[1]) for device, size in free.items()}


def _changed(
    components: StoredComponents, adapter: Adapter | None, scheme: str | None
) -> StoredComponents:
    """``components`` with the adapter added, and then quantized."""
    if adapter is not None:
        model, whisper = components.language_model.component, components.whisper.component
        changed = adapter.adapted({"language_model": model, "whisper": whisper})
        components = components.changed(**changed)
    if scheme is None:
        return components
    quantized = quantized_component(components.language_model.component, scheme)
    return components.changed(language_model=quantized)


def _load(
    components: StoredComponents,
    devices: tuple[torch.device, torch.device],
    dtype: torch.dtype,
    checksum: Callable[[StoredTensor], int] | None,
    offload: str | None,
    packed: Path | None,
) -> dict[str, Any]:
    """The modules of all components; ``packed`` is a directory whose files are mapped.

    The language model is on the first of ``devices``, the others are on the second, but both
    encoders in host memory if they are offloaded.
    """
    device, speech_device = devices
    placed: dict[torch.device, dict[str, tuple[Component, torch.dtype]]] = {}
    for name, stored in components.items():
        place = device if name == "language_model" else speech_device
        if offload is not None and name in ENCODERS:
            place = torch.device("cpu")
        placed.setdefault(place, {})[name] = stored.component, stored.served(dtype)
    total = sum(stored.component.elements for _, stored in components.items())
    modules: dict[str, Any] = {}
    with progress("Loading weights", total, "values", unit_scale=True) as bar:
        for place, group in placed.items():
            modules |= load_modules(group, place, bar.update, checksum, mapped=packed is not None)
    if packed is not None:
        open_packed(modules.values(), packed)
    return modules


def memory_plan(
    directory: Path,
    components: StoredComponents,
    dtype: torch.dtype,
    kv_cache: str,
    offload: bool,
    devices: tuple[torch.device, torch.device],
) -> MemoryPlan:
    """What the :func:`checkpoint_components` of a directory will need on ``devices``."""
    meta = torch.device("meta")
    modules = {
        name: stored.component.allocate(meta, stored.served(dtype))
        for name, stored in components.items()
        if name != "language_model"
    }
    return MemoryPlan(
        LanguageModelConfig.from_directory(directory),
        dtype,
        kv_cache,
        SpeechSizes.of(**modules),
        *devices,
        offload,
        stored_scheme(directory),
    )


def choose_scheme(directory: Path, asked: str | None, adapter: Path | None) -> str:
    """The quantization of the language model; ``asked`` is None for that of the checkpoint.

    Raises:
        CheckpointError: the weights are already quantized in another way; or there is an
            adapter, which cannot be added to quantized weights.
    """
    stored = stored_scheme(directory)
    if stored == "none":
        return asked or stored
    if asked not in (None, stored):
        raise CheckpointError(
            f"{directory}: the weights are quantized ({stored}), but {asked!r} is asked for; leave "
            "that out, or use the checkpoint that they were made from"
        )
    if adapter is not None:
        raise CheckpointError(
            f"{directory}: an adapter cannot be added to weights that are quantized ({stored}); "
            f"use the checkpoint that they were made from, with quantization {stored!r}"
        )
    return stored
