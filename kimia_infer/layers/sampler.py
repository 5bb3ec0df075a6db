"""The sampler of both tracks, and the random numbers that a request draws.

The sampler is a pure function of logits, history, parameters and one uniform number, all of which
are tensors with a row for each request. Every random number has
an address: (seed, track, step) for tokens, (seed, chunk) for the noise that a speech chunk starts
from. A request therefore gives the same answer on the same machine whatever is computed ahead,
skipped or batched.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
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

    @property
    def penalizes(self) -> bool:
        return self.repetition_penalty > 1.0


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
        return self.noise_stream(chunk, channels)(frames)

    def noise_stream(self, chunk: int, channels: int) -> Callable[[int], Tensor]:
        """Gives the next frames of :meth:`noise`, as many as it is called with."""
        generator = self._generator(_FIRST_CHUNK_STREAM + chunk)

        def following(frames: int) -> Tensor:
            drawn = generator.standard_normal((frames, channels), dtype=np.float32)
            return torch.from_numpy(drawn)

        return following


@dataclass(frozen=True)
class Form:
    """What a sampler computes for its rows: as much as those that ask most of it.

    ``window`` is the largest window of a penalty, 0 where there is none. ``top_k`` is the largest
    number of candidates to draw from, 0 for none; ``vocabulary`` says whether a row draws from all
    ids, ``greedy`` whether one takes the largest logit.
    """

    window: int
    top_k: int
    vocabulary: bool
    greedy: bool

    def covers(self, other: Form) -> bool:
        return (
            self.window >= other.window
            and self.top_k >= other.top_k
            and self.vocabulary >= other.vocabulary
            and self.greedy >= other.greedy
        )


UNBOUNDED = 2**62
RECORDED_FORMS = (
    Form(0, 0, vocabulary=False, greedy=True),
    Form(UNBOUNDED, 64, vocabulary=False, greedy=True),
    Form(UNBOUNDED, UNBOUNDED, vocabulary=True, greedy=True),
)
"""The forms that are recorded where steps are: for the largest logit, for the usual, for all."""


def form_of(samplings: Iterable[TrackSampling], recorded: bool = False) -> Form:
    """The least form that covers ``samplings``, or the least one that is ``recorded``."""
    samplings = list(samplings)
    drawn = [s.top_k for s in samplings if not s.greedy]
    form = Form(
        max((s.repetition_window_size or UNBOUNDED for s in samplings if s.penalizes), default=0),
        max(drawn, default=0),
        0 in drawn,
        not drawn or len(drawn) < len(samplings),
    )
    return next(f for f in RECORDED_FORMS if f.covers(form)) if recorded else form


@dataclass
class SamplingRows:
    """The sampling of every row on the device, where a step reads it; [rows] each."""

    temperature: Tensor
    top_k: Tensor
    penalty: Tensor
    window: Tensor

    @classmethod
    def create(cls, rows: int, device: torch.device) -> SamplingRows:
        """Rows that take the largest logit."""
        zeros = torch.zeros(rows, dtype=torch.int64, device=device)
        ones = torch.ones(rows, device=device)
        return cls(torch.zeros_like(ones), zeros, ones, torch.zeros_like(zeros))

    def put(self, row: int, sampling: TrackSampling) -> None:
        self.temperature[row] = sampling.temperature
        self.top_k[row] = sampling.top_k
        self.penalty[row] = sampling.repetition_penalty
        self.window[row] = sampling.repetition_window_size


def penalize_repetition(logits: Tensor, recent: Tensor, penalty: Tensor) -> Tensor:
    """Divide positive logits of the ids in ``recent`` by ``penalty``, multiply negative ones.

    logits [rows, vocabulary], recent int64 [rows, window], penalty [rows]; every distinct id is
    changed once.
    """
    scores, penalty = logits.gather(1, recent), penalty[:, None]
    changed = torch.where(scores < 0, scores * penalty, scores / penalty)
    return logits.scatter(1, recent, changed.to(logits.dtype))


def draw_weights(logits: Tensor, temperature: Tensor) -> Tensor:
    """Unnormalized weights float32 of the ids of logits [rows, vocabulary].

    The temperature [rows] divides the log-probabilities, so the weights need not sum to one.
    """
    temperature = temperature.clamp(min=GREEDY_TEMPERATURE)[:, None]
    return (torch.log_softmax(logits.float(), dim=-1) / temperature).exp()


def draw_dtype(device: torch.device) -> torch.dtype:
    """The dtype of a draw: float64, but float32 on devices without it, such as MPS."""
    return torch.float32 if device.type == "mps" else torch.float64


def draw(weights: Tensor, uniform: Tensor, count: Tensor | int) -> Tensor:
    """Inverse CDF: the first index whose normalized cumulative weight exceeds ``uniform``.

    weights [rows, k], of which the first ``count`` (or [rows]) may be drawn and the others are 0;
    uniform [rows] in [0, 1), of the dtype :func:`draw_dtype` -> int64 [rows].
    """
    weights = weights.to(uniform.dtype)
    cumulative = (weights / weights.sum(-1, keepdim=True)).cumsum(-1)
    index = (cumulative <= uniform[:, None]).sum(-1)
    # Rounding may leave the last value just below 1.
    return index.clamp(max=count - 1) if isinstance(count, int) else index.minimum(count - 1)


def sample(
    logits: Tensor,
    history: Tensor,
    step: Tensor,
    uniform: Tensor,
    sampling: SamplingRows,
    form: Form,
    first_id: int = 0,
) -> Tensor:
    """Choose the next id of every row of a track: int64 [rows].

    logits [rows, ids] are those of the ids from ``first_id`` on; ``history`` int64
    [rows, capacity] holds the ids of steps 0 .. step-1 of this track, blanks and end tokens
    included; ``step`` int64 [rows]; ``uniform`` [rows] as :func:`draw` takes it. ``form`` covers
    the sampling of all rows. No value is read by the host.
    """
    if window := min(form.window, history.shape[1]):
        recent = _recent(history, step, sampling.window, window) - first_id
        penalized = penalize_repetition(logits, recent, sampling.penalty)
        applies = (sampling.penalty > 1) & (step > sampling.window)
        logits = torch.where(applies[:, None], penalized, logits)
    if not form.top_k and not form.vocabulary:
        return first_id + logits.argmax(-1)
    chosen = _draw_ids(logits, uniform, sampling, form)
    if form.greedy:
        greedy = sampling.temperature <= GREEDY_TEMPERATURE
        chosen = logits.argmax(-1).where(greedy, chosen)
    return first_id + chosen


def _draw_ids(logits: Tensor, uniform: Tensor, sampling: SamplingRows, form: Form) -> Tensor:
    """An index of logits [rows, ids] for every row, int64 [rows]."""
    weights, vocabulary = draw_weights(logits, sampling.temperature), logits.shape[1]
    if not form.top_k:
        return draw(weights, uniform, vocabulary)
    top = min(form.top_k, vocabulary)
    best, ids = weights.topk(top)
    count = sampling.top_k.clamp(1, top)
    best = best.where(torch.arange(top, device=best.device) < count[:, None], 0)
    drawn = ids.gather(1, draw(best, uniform, count)[:, None])[:, 0]
    if form.vocabulary:
        drawn = draw(weights, uniform, vocabulary).where(sampling.top_k == 0, drawn)
    return drawn


def _recent(history: Tensor, step: Tensor, window: Tensor, size: int) -> Tensor:
    """The ids [rows, size] of the last ``window`` [rows] steps; of all steps so far with 0.

    Of fixed size: where there are fewer steps, ids repeat, which changes no set of them.
    """
    back = torch.arange(size, device=history.device).minimum(
        torch.where(window == 0, size, window)[:, None] - 1
    )
    return history.gather(1, (step[:, None] - 1 - back).clamp(min=0))
