"""How many requests at a time fit on which card, by calculation from the published sizes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product

import torch
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from kimia_infer.api.memory import LONGEST, MemoryPlan, SpeechSizes
from kimia_infer.api.parameters import MAX_SLOTS
from kimia_infer.models.kimi_audio.dit import DiT
from kimia_infer.models.kimi_audio.encoders import SpeechTokenizer
from kimia_infer.models.kimi_audio.vocoder import Vocoder
from scripts.benchmark.sizes import PUBLISHED

CARDS = {16: 15.6, 24: 23.6, 48: 47.4, 80: 79.2, 141: 139.8}
"""GiB that the driver reports, by the nominal GB of a card."""

CONTEXT = 400_000_000
"""Bytes that a CUDA device takes before anything is loaded."""

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
COLUMNS = ((24,), (48,), (80,), (141,), (24, 16))
SCHEMES = {"none": "bfloat16", "fp8": "fp8", "int8": "int8"}
CACHES = {"none": "bfloat16", "fp8": "fp8"}


def free_bytes(card: int) -> int:
    return round(CARDS[card] * 2**30 - CONTEXT)


@cache
def speech_sizes() -> SpeechSizes:
    half = torch.bfloat16
    with torch.device("meta"):
        return SpeechSizes.of(
            SpeechTokenizer(PUBLISHED.speech_tokenizer),
            WhisperEncoder(PUBLISHED.whisper).to(half),
            DiT(PUBLISHED.dit).to(half),
            Vocoder(PUBLISHED.vocoder).to(half),
        )


def published_plan(kv_cache: str = "none", speech_device: torch.device = FIRST) -> MemoryPlan:
    """The published model in bfloat16 on FIRST, encoders and speech on ``speech_device``."""
    model, half = PUBLISHED.language_model, torch.bfloat16
    return MemoryPlan(model, half, kv_cache, speech_sizes(), FIRST, speech_device)


def requests_at_a_time(plan: MemoryPlan, scheme: str, cards: tuple[int, ...]) -> tuple[int, int]:
    """Conversations with speech, and texts of the longest length, that fit; 0 if none does."""
    free = dict(zip((FIRST, SECOND), map(free_bytes, cards), strict=False))
    talking, long = plan.capacity(scheme, True, free), 0
    for slots in range(1, MAX_SLOTS + 1):
        found = plan.capacity(scheme, True, free, slots)
        if found is not None and found.positions == slots * LONGEST:
            long = slots
    return (0 if talking is None else talking.slots), long


def table() -> Iterator[str]:
    """Lines of Markdown, a row for each kind of weights and cache."""
    names = [" + ".join(f"{card} GB" for card in cards) for cards in COLUMNS]
    yield f"| weights | cache | {' | '.join(names)} |"
    yield "|---" * (2 + len(names)) + "|"
    for (scheme, weights), (kv_cache, stored) in product(SCHEMES.items(), CACHES.items()):
        cells = []
        for cards in COLUMNS:
            plan = published_plan(kv_cache, FIRST if len(cards) == 1 else SECOND)
            talking, long = requests_at_a_time(plan, scheme, cards)
            cells.append(f"{talking} / {long}" if talking else "–")
        yield f"| {weights} | {stored} | {' | '.join(cells)} |"
