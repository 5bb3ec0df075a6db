"""How near a variant of the language model stays to another one: tokens and logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.parameters import CODES_PER_SECOND, parse_parameters
from kimia_infer.engine.decode import DecodeInput, Generation
from kimia_infer.layers.attention import CachedAttention
from kimia_infer.layers.cache import KV_CACHES, KeyValueCache
from kimia_infer.models.kimi_audio.messages import parse_messages
from kimia_infer.utils.randomness import SeededRandomness
from scripts.benchmark.requests import REPLY_SECONDS, Audio

TRACKS = ("text", "audio")


@dataclass(frozen=True)
class Reference:
    """A greedy answer: ids int64 [steps] and logits [steps, rows] of both tracks.

    ``first`` and ``end`` of a track are the steps that count: up to the end of the text, and
    from the delay on.
    """

    ids: dict[str, Tensor]
    logits: dict[str, Tensor]
    first: dict[str, int]
    end: dict[str, int]


def refer(model: KimiAudio, audio: Audio) -> Reference:
    """The answer of ``model`` in text and speech to a spoken question."""
    prompt = _prompt(model, audio)
    ids, generation = _greedy(model, prompt)
    first = {"text": 0, "audio": generation.delay}
    end = {"text": len(generation.text_ids), "audio": generation.steps}
    return Reference(ids, _logits(model, prompt, ids), first, end)


def compare(
    model: KimiAudio, audio: Audio, reference: Reference
) -> dict[str, dict[str, float] | None]:
    """By track, as parts of 1 but for ``divergence``, which is in nats a token.

    ``leading`` is what of the reference's answer comes before the first other token of the
    model's own. The rest is seen while it is given the reference's tokens: ``agreement`` of the
    likeliest ones, the mean ``cosine`` of logits, and the mean ``divergence`` (Kullback-Leibler,
    of the reference from it) of distributions. A track that the reference's answer does not have
    is None.
    """
    prompt = _prompt(model, audio)
    own, _ = _greedy(model, prompt)
    logits = _logits(model, prompt, reference.ids)
    return {track: _compare_track(track, own[track], logits[track], reference) for track in TRACKS}


def _compare_track(
    track: str, own: Tensor, logits: Tensor, reference: Reference
) -> dict[str, float] | None:
    steps = slice(reference.first[track], reference.end[track])
    if steps.start >= steps.stop:
        return None
    # Divergences of nearly equal distributions are below the rounding of float32.
    expected, found = reference.logits[track][steps].double(), logits[steps].double()
    ids = reference.ids[track][steps]
    known, log_found = F.log_softmax(expected, -1), F.log_softmax(found, -1)
    same = expected.argmax(-1) == found.argmax(-1)
    return {
        "leading": _leading(own[steps], ids) / len(ids),
        "agreement": same.float().mean().item(),
        "cosine": F.cosine_similarity(expected, found, dim=-1).mean().item(),
        "divergence": F.kl_div(log_found, known, reduction="batchmean", log_target=True).item(),
    }


def _leading(own: Tensor, ids: Tensor) -> int:
    """Ids before the first that differ."""
    length = min(len(own), len(ids))
    different = (own[:length] != ids[:length]).nonzero()
    return int(different[0]) if len(different) else length


def _prompt(model: KimiAudio, audio: Audio) -> DecodeInput:
    content = audio if isinstance(audio, bytes) else str(audio)
    chat = [{"role": "user", "message_type": "audio", "content": content}]
    prompt, features = model.encode_chat(parse_messages(chat), parse_parameters(output_type="both"))
    ids = torch.tensor([[prompt.audio_ids], [prompt.text_ids]], device=model.device)
    mask = torch.tensor([prompt.is_continuous], device=model.device)
    return DecodeInput(ids[0], ids[1], mask, features)


def _greedy(model: KimiAudio, prompt: DecodeInput) -> tuple[dict[str, Tensor], Generation]:
    """Ids of both tracks of every step of an answer."""
    options = parse_parameters(output_type="both")
    delay = model.language_model.config.audio_delay
    limit = min(delay + round(REPLY_SECONDS * CODES_PER_SECOND), options.step_limit(prompt.length))
    generation = Generation(
        model.decoder, prompt, "both", limit, options.sampling, SeededRandomness(0)
    )
    for _ in generation.run():
        pass
    with model.decoder.borrow() as state:  # the one that it has just given back
        stores = {"text": state.text.store, "audio": state.audio.store}
        return {track: s[: generation.steps].cpu() for track, s in stores.items()}, generation


@torch.inference_mode()
def _logits(model: KimiAudio, prompt: DecodeInput, ids: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of both tracks before each of ``ids``, which are what the model is given."""
    language_model, decoder = model.language_model, model.decoder
    audio, text = (ids[track][:-1, None].to(model.device) for track in ("audio", "text"))
    # Each step is a row of its own, whose text counts by itself.
    steps = language_model.embed(audio, text).transpose(0, 1)
    read = language_model.embed(
        prompt.audio_ids, prompt.text_ids, prompt.is_continuous, prompt.features
    )
    x = torch.cat([read, steps], dim=1)
    cache = KeyValueCache(
        language_model.config, x.shape[1], model.device, x.dtype, KV_CACHES[decoder.kv_cache]
    )
    hidden = language_model(x, CachedAttention(decoder.backend, cache).at(0))
    first = prompt.length - 1
    return {
        "text": language_model.text_head(hidden.text[0, first:]).cpu(),
        "audio": language_model.audio_head(hidden.audio[0, first:]).cpu(),
    }
