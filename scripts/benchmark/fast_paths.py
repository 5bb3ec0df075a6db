"""Fast paths of a device against slow ones: Triton kernels, recorded graphs."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from kimia_infer.engine.decode import Decoder
from kimia_infer.engine.generation import Generation
from kimia_infer.layers import operators
from kimia_infer.layers.attention import BACKENDS, KV_CACHES, CachedAttention
from kimia_infer.layers.quantization import SCHEMES, check_quantization, quantize_model
from kimia_infer.layers.sampler import Sampling, SeededRandomness, TrackSampling
from kimia_infer.models.kimi_audio.language_model import LanguageModel
from kimia_infer.models.kimi_audio.vocoder import Vocoder
from kimia_infer.utils.graphs import Direct
from scripts.benchmark.checks import Check, Findings, Found, Place, skipped
from scripts.benchmark.decoding import PROMPT_LENGTH, dequantized, random_prompt
from scripts.benchmark.random_models import random_language_model, random_module
from scripts.benchmark.references import generated
from scripts.benchmark.sizes import Sizes

GRAPH_STEPS = 64
EAGER_FACTOR = 1.5
"""How much further from float32 a kernel in bfloat16 may be than PyTorch's operations."""


def checks(place: Place, sizes: Sizes) -> dict[str, Check]:
    """With random weights of ``sizes``, whose language model has few layers."""
    return {
        "language model": lambda: kernels(place, sizes),
        "vocoder": lambda: vocoder_kernels(place, sizes),
        "token loop": lambda: graphs(place, sizes),
    }


class Unrecorded(Direct):
    """Launches one by one what would be recorded, in the same shapes."""

    captures = True


def short_model(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> LanguageModel:
    """Random weights of full width, and few layers."""
    config = replace(sizes.language_model, trunk_layers=2, fork_layer=0, mimo_layers=1)
    return random_language_model(replace(sizes, language_model=config), device, dtype)


def step_logits(
    model: LanguageModel, backend: str, kv_cache: str, length: int, eager: bool
) -> Tensor:
    """Logits [2, rows] of a step after a random prompt of ``length`` positions.

    ``eager`` uses PyTorch's operations instead of kernels.
    """
    prompt, _ = random_prompt(model)
    audio, text = prompt.audio_ids[:, :length], prompt.text_ids[:, :length]
    cache = model.new_cache(2 * length, 2 * length, KV_CACHES[kv_cache])
    attention = CachedAttention(BACKENDS[backend], cache)
    # Kernels have no gradient, so they are not used where one may be needed.
    with torch.inference_mode(not eager), torch.set_grad_enabled(eager):
        model(model.embed(audio, text), attention.sequence(0, 0))
        start, position = torch.tensor([[0], [length]], device=model.device)
        x = model.embed(audio[:, :1], text[:, :1])
        hidden = model(x, attention.recorded_tokens(start, position, 2 * length))
        tracks = model.text_head(hidden.text[0, 0]), model.audio_head(hidden.audio[0, 0])
        return torch.stack(tracks).float().cpu()


def kernels(
    place: Place,
    sizes: Sizes,
    schemes: Iterable[str] = SCHEMES,
    kv_caches: Iterable[str] = tuple(KV_CACHES),
    length: int = PROMPT_LENGTH,
) -> Findings:
    """Steps of full width in bfloat16, with kernels and without: how far both are from float32."""
    device = place.device
    if (lacking := operators.missing(device)) is not None:
        yield "Triton", Found(None, 0.0, f"skipped: {lacking}")
        return
    for scheme, kv_cache in product(schemes, kv_caches):
        name = f"step, weights {scheme}, cache {kv_cache}"
        try:
            check_quantization(scheme, device)
        except ValueError as error:
            yield name, Found(None, 0.0, skipped(error))
            continue
        model = quantize_model(short_model(sizes, device, torch.bfloat16), scheme)
        whole = copy.deepcopy(dequantized(model)).float()
        exact = step_logits(whole, "sdpa", "none", length, eager=True)
        fused = step_logits(model, "triton", kv_cache, length, eager=False)
        eager = step_logits(model, "sdpa", kv_cache, length, eager=True)
        yield name, compared(fused, eager, exact)


def compared(fused: Tensor, eager: Tensor, exact: Tensor) -> Found:
    """How far kernels are from float32, limited by how far PyTorch's operations are."""
    error, limit = ((x - exact).norm() / exact.norm() for x in (fused, eager))
    return Found(float(error), EAGER_FACTOR * float(limit))


def vocoder_kernels(place: Place, sizes: Sizes) -> Findings:
    """A vocoder in bfloat16, with kernels and without: how far both are from float32."""
    device = place.device
    if (lacking := operators.missing(device)) is not None:
        yield "vocoder", Found(None, 0.0, f"skipped: {lacking}")
        return
    half = random_module(lambda: Vocoder(sizes.vocoder), device, torch.bfloat16)
    whole = copy.deepcopy(half).float()
    mel = torch.randn(30, sizes.vocoder.mel_bins, generator=torch.Generator().manual_seed(0))
    with torch.enable_grad():
        exact = whole(mel.to(device)).float()
        eager = half(mel.to(device, torch.bfloat16)).float()
    with torch.inference_mode():
        fused = half(mel.to(device, torch.bfloat16)).float()
    yield "vocoder", compared(fused, eager, exact)


def graphs(place: Place, sizes: Sizes) -> Findings:
    """Tokens of full-width steps in bfloat16: recorded, against launched one by one."""
    if len(place.launches()) == 1:
        yield "recorded graphs", Found(None, 0.0, f"skipped: {place.device} records none")
        return
    model = short_model(sizes, place.device, torch.bfloat16)
    prompt, control = random_prompt(model)
    track = TrackSampling(0.9, 10, 1.1, 16)
    sampling = Sampling(audio=track, text=track)
    for output in ("text", "both"):
        found = []
        for make_graphs in (lambda device: Unrecorded(), place.make_graphs):
            capacity = prompt.length + GRAPH_STEPS
            decoder = Decoder(model, control, capacity, make_graphs=make_graphs)
            draws = SeededRandomness(0)
            generation = Generation(decoder, prompt, output, GRAPH_STEPS, sampling, draws, 8)
            found.append(generated(generation))
        different = sum(one != other for one, other in zip(*found, strict=True))
        yield f"{GRAPH_STEPS} sampled steps, {output}", Found(different, 0)
