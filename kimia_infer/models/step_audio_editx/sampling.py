"""Which token comes next, and when an answer ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kimia_infer.layers.sampler import draw, draw_dtype, draw_weights
from kimia_infer.models.step_audio_editx.language_model import LanguageModel
from kimia_infer.models.step_audio_editx.packing import (
    AUDIO_TOKENS,
    GROUP,
    VQ02_CODES,
    VQ02_PER_GROUP,
)

TEMPERATURE, TOP_K = 0.7, 50
"""The published call gives the first; the second is the default of transformers, active in it."""

WINDOW = 10
"""An id that is the last and occurs more than once among the last ten may not be the next."""


@dataclass(frozen=True)
class AudioRange:
    """Where audio tokens stand among the ids, and the id that ends an answer.

    With it only what makes sound can be drawn: VQ02 and VQ06 tokens where a group has them, and
    the end behind a whole group.
    """

    first: int
    end: int

    def mask(self, logits: Tensor, place: int) -> Tensor:
        """``logits`` [ids] with -inf at what cannot stand at ``place`` of an answer."""
        allowed = torch.full_like(logits, -torch.inf)
        begin, stop = 0, VQ02_CODES
        if place % GROUP >= VQ02_PER_GROUP:
            begin, stop = VQ02_CODES, AUDIO_TOKENS
        span = slice(self.first + begin, self.first + stop)
        allowed[span] = logits[span]
        if place and place % GROUP == 0:
            allowed[self.end] = logits[self.end]
        return allowed


def ban_repetition(logits: Tensor, context: Tensor) -> Tensor:
    """``logits`` [ids], the last id of ``context`` [tokens] banned if it recurs in its WINDOW."""
    recent = context[-WINDOW:]
    if len(recent) < WINDOW:
        return logits
    last = recent[-1:]
    repeated = (recent == last).sum() > 1
    banned = logits.index_fill(0, last, -torch.inf)
    return torch.where(repeated, banned, logits)


def choose(
    logits: Tensor, uniform: Tensor, temperature: float = TEMPERATURE, top_k: int = TOP_K
) -> Tensor:
    """An id, int64 [1], among the ``top_k`` best of logits [ids].

    In the order of ids, the first whose cumulative probability exceeds ``uniform`` [1].
    """
    logits = logits.float()
    least = logits.topk(min(top_k, len(logits))).values[-1]
    kept = logits.masked_fill(logits < least, -torch.inf)
    weights = draw_weights(kept[None], torch.full_like(kept[:1], temperature))
    return draw(weights, uniform, len(logits))


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompt: Sequence[int],
    uniforms: Tensor,
    end: int,
    audio: AudioRange | None = None,
    temperature: float = TEMPERATURE,
    top_k: int = TOP_K,
) -> Iterator[int]:
    """The ids of an answer, without its end: as many as there are ``uniforms`` at most.

    Args:
        prompt: ids.
        uniforms: one number in [0, 1) for every id that is drawn, float64 [ids].
        end: the id that ends the answer.
        audio: if given, only what makes sound can be drawn.
    """
    device = model.device
    positions = len(prompt) + len(uniforms)
    cache = model.new_cache(positions)
    context = torch.zeros(positions, dtype=torch.int64, device=device)
    context[: len(prompt)] = torch.tensor(prompt)
    uniforms = uniforms.to(device, draw_dtype(device))
    logits = model.read(prompt, cache)
    for place in range(len(uniforms)):
        position = len(prompt) + place
        logits = ban_repetition(logits, context[:position])
        if audio is not None:
            logits = audio.mask(logits, place)
        token = choose(logits, uniforms[place : place + 1], temperature, top_k)
        if (found := int(token)) == end:
            return
        yield found
        context[position] = token[0]
        if place + 1 < len(uniforms):
            logits = model.step(token, position, cache)
