"""A quantized variant against the plain model: decode steps, whole requests, tokens and logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.parameters import CODES_PER_SECOND, parse_parameters
from kimia_infer.engine.generation import DecodeInput
from kimia_infer.layers.quantization import check_quantization
from kimia_infer.models.kimi_audio.language_model import LanguageModel
from kimia_infer.models.kimi_audio.prompt import parse_messages
from scripts.benchmark.decoding import (
    BANDWIDTH_NOTE,
    Contender,
    contenders,
    library_decoder,
    race,
    random_prompt,
    step_rows,
    with_cut_heads,
)
from scripts.benchmark.measuring import copy_bandwidth, parameter_bytes
from scripts.benchmark.quality import compare, refer
from scripts.benchmark.report import Table
from scripts.benchmark.requests import (
    REPLY_SECONDS,
    REQUESTS,
    answer,
    median_metrics,
    request_rows,
    spoken_chat,
)

QUALITY_STEPS = 64
"""Length of an answer with random weights; with a checkpoint it has up to REPLY_SECONDS."""


def compare_steps(
    plain: LanguageModel,
    load: Callable[[str], LanguageModel],
    scheme: str,
    kv_cache: str,
    steps: int,
    runs: int,
) -> list[Table]:
    """Decode steps, and tokens and logits of random weights after a random prompt."""
    check_quantization(scheme, plain.device)
    model = with_cut_heads(load(scheme) if scheme != "none" else plain)
    cut = with_cut_heads(plain)
    name = scheme if kv_cache == "none" else f"{scheme}, {kv_cache} cache"
    reference = contenders("none", cut, "track", steps)
    entered = [*reference, *contenders(name, model, "track", steps, kv_cache)]
    race(entered, runs)
    bandwidth = copy_bandwidth(plain.device)

    def against(contender: Contender) -> Contender:
        return next(other for other in reference if other.mode == contender.mode)

    sizes = parameter_bytes(cut) / 1e9, parameter_bytes(model) / 1e9
    note = f"Weights of the language model: none {sizes[0]:.2f} GB, {name} {sizes[1]:.2f} GB."
    prompt, _ = random_prompt(plain)
    expected = refer(library_decoder(cut, QUALITY_STEPS), prompt, QUALITY_STEPS)
    decoder = library_decoder(model, QUALITY_STEPS, kv_cache)
    return [
        Table(
            f"{name} against none: decode steps, {steps} steps, {runs} interleaved runs, medians",
            step_rows(entered, steps, bandwidth, against),
            [BANDWIDTH_NOTE.format(bandwidth / 1e9), note],
        ),
        Table(
            f"{name} against none, from a random prompt",
            compare(decoder, prompt, QUALITY_STEPS, expected),
        ),
    ]


def compare_requests(
    plain: KimiAudio, variant: KimiAudio, name: str, audio: Path | bytes, runs: int
) -> list[Table]:
    """Whole requests of both, in turns; tokens and logits of the spoken answer."""
    models = {"none": plain, name: variant}
    columns = {}
    for request in ("text", "speech"):
        answers: dict[str, list] = {label: [] for label in models}
        for _ in range(runs + 1):
            for label, model in models.items():
                answers[label].append(answer(model, audio, REQUESTS[request]))
        columns |= {f"{request}, {k}": median_metrics(found[1:]) for k, found in answers.items()}
    speech = [columns[f"speech, {label}"]["total_seconds"] for label in models]
    prompts = [encoded(model, audio) for model in models.values()]
    steps = plain.language_model.config.audio_delay + round(REPLY_SECONDS * CODES_PER_SECOND)
    quality = compare(variant.decoder, prompts[1], steps, refer(plain.decoder, prompts[0], steps))
    return [
        Table(
            f"{name} against none: whole requests, {runs} interleaved runs, median seconds",
            request_rows(columns),
            [f"Spoken requests a second, none = 1: {speech[0] / speech[1]:.2f}."],
        ),
        Table(f"{name} against none, answer to the question", quality),
    ]


def encoded(model: KimiAudio, audio: Path | bytes) -> DecodeInput:
    """The prompt of a spoken question that is answered in text and speech."""
    messages = parse_messages(spoken_chat(audio))
    prompt, features = model.encode_chat(messages, parse_parameters(output_type="both"))
    ids = torch.tensor([[prompt.audio_ids], [prompt.text_ids]], device=model.device)
    mask = torch.tensor([prompt.is_continuous], device=model.device)
    return DecodeInput(ids[0], ids[1], mask, features)
