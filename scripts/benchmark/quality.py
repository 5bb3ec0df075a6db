"""How close a variant of the language model stays to another one: tokens and logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kimia_infer.engine.decode import Decoder
from kimia_infer.engine.generation import DecodeInput, Generation
from kimia_infer.layers.attention import KV_CACHES, CachedAttention
from kimia_infer.layers.sampler import SeededRandomness
from scripts.benchmark.decoding import GREEDY, common_prefix
from scripts.benchmark.report import Cell

TRACKS = ("text", "audio")


@dataclass(frozen=True)
class Reference:
    """A greedy answer: ids int64 [steps] and logits [steps, rows] of both tracks.

    ``steps`` are those that count: up to the end of the text, and from the delay on.
    """

    ids: dict[str, Tensor]
    logits: dict[str, Tensor]
    steps: dict[str, slice]


def refer(decoder: Decoder, prompt: DecodeInput, steps: int) -> Reference:
    """The answer of a decoder's model in text and speech, of at most ``steps``."""
    ids, generation = _greedy(decoder, prompt, steps)
    counted = {
        "text": slice(0, len(generation.text_ids)),
        "audio": slice(generation.delay, generation.steps),
    }
    return Reference(ids, _logits(decoder, prompt, ids), counted)


def compare(
    decoder: Decoder, prompt: DecodeInput, steps: int, reference: Reference
) -> list[dict[str, Cell]]:
    """A row for each track that the reference's answer has.

    ``equal tokens`` is the share of the reference's answer before the first different token of
    the model's own answer. The rest is measured while it is given the reference's tokens: how often
    the most likely tokens agree, the mean cosine of logits, and the mean Kullback-Leibler
    divergence of the reference from it, in nats per token.
    """
    own, _ = _greedy(decoder, prompt, steps)
    logits = _logits(decoder, prompt, reference.ids)
    compared = ((t, compare_track(t, own[t], logits[t], reference)) for t in TRACKS)
    return [{"track": track, **found} for track, found in compared if found]


def compare_track(
    track: str, own: Tensor, logits: Tensor, reference: Reference
) -> dict[str, float] | None:
    """The figures of :func:`compare` for a track; None if no step of it counts."""
    steps = reference.steps[track]
    if steps.start >= steps.stop:
        return None
    # Divergences of nearly equal distributions are below the rounding of float32.
    expected, found = reference.logits[track][steps].double(), logits[steps].double()
    ids = reference.ids[track][steps]
    same = expected.argmax(-1) == found.argmax(-1)
    logs = F.log_softmax(found, -1), F.log_softmax(expected, -1)
    return {
        "equal tokens": common_prefix(own[steps].tolist(), ids.tolist()) / len(ids),
        "agreement": same.float().mean().item(),
        "cosine": F.cosine_similarity(expected, found, dim=-1).mean().item(),
        "divergence": F.kl_div(*logs, reduction="batchmean", log_target=True).item(),
    }


def _greedy(
    decoder: Decoder, prompt: DecodeInput, steps: int
) -> tuple[dict[str, Tensor], Generation]:
    """Ids of both tracks of every step of an answer."""
    generation = Generation(decoder, prompt, "both", steps, GREEDY, SeededRandomness(0))
    for _ in generation.run():
        pass
    stores = {"text": decoder.rows.text.store, "audio": decoder.rows.audio.store}
    return {track: s[0, : generation.steps].cpu() for track, s in stores.items()}, generation


@torch.inference_mode()
def _logits(decoder: Decoder, prompt: DecodeInput, ids: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of both tracks before each of ``ids``, which are what the model is given."""
    model = decoder.model
    audio, text = (ids[track][:-1, None].to(model.device) for track in ("audio", "text"))
    # Every step is embedded as a row, whose text counts by itself.
    given = model.embed(audio, text).transpose(0, 1)
    read = model.embed(prompt.audio_ids, prompt.text_ids, prompt.is_continuous, prompt.features)
    x = torch.cat([read, given], dim=1)
    cache = model.new_cache(x.shape[1], x.shape[1], KV_CACHES[decoder.kv_cache])
    hidden = model(x, CachedAttention(decoder.backend, cache).sequence(0, 0))
    first = prompt.length - 1
    return {
        "text": model.text_head(hidden.text[0, first:]).cpu(),
        "audio": model.audio_head(hidden.audio[0, first:]).cpu(),
    }
