"""The sampler of both tracks, and the random numbers that a request draws.

The sampler is a pure function of logits, history and one uniform number. Every random number has
an address: (seed, track, step) for tokens, (seed, chunk) for the noise that a speech chunk starts
from. A request therefore gives the same answer on the same machine whatever is computed ahead,
skipped or batched.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

GREEDY_TEMPERATURE = 1e-6
"""At or below this temperature the published sampler takes the largest logit."""

MAX_SEED = 2**32 - 1
"""The largest integer that every client can represent, so that a drawn seed can be sent back."""

Track = Literal["text", "audio"]
_TRACK_STREAMS: dict[Track, int] = {"text": 0, "audio": 1}
_FIRST_CHUNK_STREAM = len(_TRACK_STREAMS)


@dataclass(frozen=True)
class TrackSampling:
    """How the tokens of one track are chosen.

    ``temperature`` at or below 1e-6 is greedy. ``top_k`` 0 draws from the whole vocabulary.
    ``repetition_penalty`` above 1 weakens the ids among the last ``repetition_window_size``
    tokens, once more than that many have been generated; a window of 0 is all of them.
    """

    temperature: float
    top_k: int
    repetition_penalty: float
    repetition_window_size: int

    @property
    def greedy(self) -> bool:
        return self.temperature <= GREEDY_TEMPERATURE


@dataclass(frozen=True)
class Sampling:
    """Sampling of both tracks."""

    audio: TrackSampling
    text: TrackSampling


class Randomness(Protocol):
    """Source of the random numbers of the decode loop and the detokenizer."""

    def uniforms(self, track: Track, steps: int) -> Tensor:
        """float64 [steps] in [0, 1): the draw of every decode step of a track."""

    def noise(self, chunk: int, frames: int, channels: int) -> Tensor:
        """float32 [frames, channels], standard normal: the start of a speech chunk."""


class SeededRandomness:
    """The random numbers of one request, from one seed.

    The address is the key of the counter-based Philox generator, whose stream NumPy guarantees to
    keep.
    """

    def __init__(self, seed: int | None = None):
        """``seed`` in 0 .. 2**32 - 1; None draws one from the operating system."""
        self.seed = secrets.randbelow(MAX_SEED + 1) if seed is None else seed

    def _generator(self, stream: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self.seed, stream]))

    def uniforms(self, track: Track, steps: int) -> Tensor:
        return torch.from_numpy(self._generator(_TRACK_STREAMS[track]).random(steps))

    def noise(self, chunk: int, frames: int, channels: int) -> Tensor:
        generator = self._generator(_FIRST_CHUNK_STREAM + chunk)
        return torch.from_numpy(generator.standard_normal((frames, channels), dtype=np.float32))


def penalize_repetition(logits: Tensor, recent: Tensor, penalty: float) -> Tensor:
    """Divide positive logits of the ids in ``recent`` by ``penalty``, multiply negative ones.

    logits [vocabulary], recent int64 [window]; every distinct id is changed once.
    """
    scores = logits[recent]
    return logits.scatter(0, recent, torch.where(scores < 0, scores * penalty, scores / penalty))


def draw_weights(logits: Tensor, temperature: float, top_k: int) -> tuple[Tensor, Tensor | None]:
    """Unnormalized weights to draw from and the ids they stand for.

    logits [vocabulary] -> weights float32 [k] in descending order and ids int64 [k]; with
    ``top_k`` 0 the weights of the whole vocabulary and None. The temperature divides the
    log-probabilities, so the weights need not sum to one.
    """
    weights = (torch.log_softmax(logits.float(), dim=-1) / temperature).exp()
    if top_k == 0:
        return weights, None
    weights, ids = weights.topk(top_k)
    return weights, ids


def draw_dtype(device: torch.device) -> torch.dtype:
    """The dtype of a draw: float64, but float32 on devices without it, such as MPS."""
    return torch.float32 if device.type == "mps" else torch.float64


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Inverse CDF: the first index whose normalized cumulative weight exceeds ``uniform``.

    weights [k], uniform [1] in [0, 1), of the dtype :func:`draw_dtype` -> int64 [1].
    """
    weights = weights.to(uniform.dtype)
    cumulative = (weights / weights.sum()).cumsum(0)
    # Rounding may leave the last value just below 1.
    return (cumulative <= uniform).sum(0, keepdim=True).clamp(max=len(weights) - 1)


def sample(
    logits: Tensor,
    history: Tensor,
    step: Tensor,
    uniform: Tensor,
    sampling: TrackSampling,
    first_id: int = 0,
) -> Tensor:
    """Choose the next id of a track: int64 [1].

    logits [rows] are those of the ids from ``first_id`` on; ``history`` int64 [capacity] holds the
    ids of steps 0 .. step-1 of this track, blanks and end tokens included; ``step`` int64 [1];
    ``uniform`` [1] as :func:`draw` takes it. No value is read by the host.
    """
    window = sampling.repetition_window_size
    if sampling.repetition_penalty > 1.0 and len(history):
        recent = _recent(history, step, window) - first_id
        penalized = penalize_repetition(logits, recent, sampling.repetition_penalty)
        logits = torch.where(step > window, penalized, logits)
    if sampling.greedy:
        return first_id + logits.argmax().view(1)
    weights, ids = draw_weights(logits, sampling.temperature, sampling.top_k)
    index = draw(weights, uniform)
    return first_id + (index if ids is None else ids[index]).view(1)


def _recent(history: Tensor, step: Tensor, window: int) -> Tensor:
    """The ids of the last ``window`` steps; of all steps so far with 0.

    Of fixed size: where there are fewer steps, ids repeat, which changes no set of them.
    """
    size = window or len(history)
    places = torch.arange(size, device=history.device) + (step - window if window else 0)
    return history[places.clamp(min=0).minimum((step - 1).clamp(min=0))]
