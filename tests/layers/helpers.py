"""A reference of attention, and models and questions that tests of layers share."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.parameters import parse_parameters
from kimia_infer.engine.generation import DecodeInput
from kimia_infer.layers.attention import CachedAttention, choose_backend
from kimia_infer.layers.sampler import Sampling, TrackSampling
from kimia_infer.models.kimi_audio.language_model import LanguageModel
from kimia_infer.models.kimi_audio.prompt import parse_messages
from scripts.benchmark.random_models import random_language_model
from scripts.benchmark.sizes import SIZES
from tests.paths import MINI, ROOT

CPU = torch.device("cpu")
QUESTION = ROOT / "scripts" / "question.wav"
SAMPLING = Sampling(audio=TrackSampling(0.9, 5, 1.0, 64), text=TrackSampling(0.8, 5, 1.1, 16))


def reference(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Written out per head: the last queries of a sequence, causal, grouped keys."""
    group = query.shape[1] // keys.shape[1]
    length, total = query.shape[2], keys.shape[2]
    out = torch.empty_like(query)
    for head in range(query.shape[1]):
        for row in range(length):
            seen = total - length + row + 1
            scores = keys[0, head // group, :seen] @ query[0, head, row]
            weights = torch.softmax(scores / math.sqrt(query.shape[3]), 0)
            out[0, head, row] = weights @ values[0, head // group, :seen]
    return out


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def miniature() -> tuple[LanguageModel, DecodeInput]:
    """Asked as it is in use: with a spoken question."""
    kimi = KimiAudio(str(MINI), load_detokenizer=False, device="cpu", dtype="float32")
    chat = [{"role": "user", "message_type": "audio", "content": str(QUESTION)}]
    prompt, features = kimi.encode_chat(parse_messages(chat), parse_parameters())
    ids = torch.tensor([[prompt.audio_ids], [prompt.text_ids]])
    mask = torch.tensor([prompt.is_continuous])
    return kimi.language_model, DecodeInput(ids[0], ids[1], mask, features)


def middle() -> tuple[LanguageModel, DecodeInput]:
    """Random, of the benchmark's size for CPUs; the vocabulary is cut, which logits hardly see."""
    sizes = SIZES["mid"]
    config = replace(
        sizes.language_model, base_tokens=1000, token_offset=1500, vocab_size=2500, audio_delay=6
    )
    model = random_language_model(replace(sizes, language_model=config), CPU, torch.float32)
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(1, config.vocab_size, (1, 40), generator=generator) for _ in range(2)]
    return model, DecodeInput(*ids)


@torch.inference_mode()
def logits(
    model: LanguageModel, prompt: DecodeInput, cache_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Of both heads at every position; ``cache_dtype`` is the dtype of the cache."""
    x = model.embed(prompt.audio_ids, prompt.text_ids, prompt.is_continuous, prompt.features)
    backend = choose_backend(CPU, model.config.head_dim)
    cache = model.new_cache(x.shape[1], x.shape[1], cache_dtype)
    hidden = model(x, CachedAttention(backend, cache).sequence(0, 0))
    return model.text_head(hidden.text[0]), model.audio_head(hidden.audio[0])


class Device:
    """Stands for ``torch.cuda``."""

    def __init__(self, *capability: int):
        self.capability = capability

    def get_device_capability(self, device: torch.device) -> tuple[int, ...]:
        return self.capability
