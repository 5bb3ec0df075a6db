"""The state of a generation in tensors on the device, and the step that advances it.

A step reads and writes nothing else: logits of the tokens chosen last, both samplers, the delay
of the audio track, blanks, stop conditions and token stores. It needs nothing from the host, so
where graphs are captured it is recorded once and launched as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kimia_infer.layers.attention import Attend, Backend, CachedAttention
from kimia_infer.layers.sampler import Randomness, Sampling, TrackSampling, draw_dtype, sample
from kimia_infer.models.kimi_audio.language_model import LanguageModel
from kimia_infer.utils.graphs import Graphs

# Attention that reads all of its extent is recorded for these; longer ones for the capacity.
EXTENTS = (256, 512, 1024, 2048, 4096)
KEPT_SAMPLINGS = 16  # recordings of samplers with other parameters make room


class Tracks(NamedTuple):
    """Which tracks a step computes."""

    text: bool
    audio: bool


TEXT = Tracks(text=True, audio=False)
BOTH = Tracks(text=True, audio=True)
# After the text has ended: nothing above the fork reaches the audio track.
AUDIO = Tracks(text=False, audio=True)


@dataclass(frozen=True)
class ControlTokens:
    """Ids that steer the loop: the blank of both tracks and the tokens that end them."""

    blank: int
    text_end: int
    audio_ends: tuple[int, ...]


def extent_of(position: int, capacity: int) -> int:
    """The extent that attention is recorded for where the last position is this one."""
    return min(next((e for e in EXTENTS if e > position), capacity), capacity)


class TrackState:
    """One track: ids of all steps, their draws, the last id, its successor's logits.

    ``store`` int64 and ``uniforms`` [capacity]; ``count`` int64 [1] of ids that belong to
    the answer; ``latest`` int64 [1, 1]; ``logits`` [rows] of the ids from ``first_id`` on.
    """

    def __init__(self, head: nn.Linear, first_id: int, capacity: int, blank: int):
        device, dtype = head.weight.device, head.weight.dtype
        self.head, self.first_id = head, first_id
        self.store = torch.full((capacity,), blank, device=device)
        self.uniforms = torch.zeros(capacity, dtype=draw_dtype(device), device=device)
        self.count = torch.zeros(1, dtype=torch.int64, device=device)
        self.latest = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self.logits = torch.zeros(head.weight.shape[0], dtype=dtype, device=device)

    def reset(self, uniforms: Tensor, blank: int) -> None:
        self.store.fill_(blank)
        self.count.zero_()
        self.uniforms[: len(uniforms)] = uniforms

    def read_head(self, hidden: Tensor) -> None:
        """Logits of the last position of hidden [1, length, hidden_size]."""
        self.logits.copy_(self.head(hidden[0, -1:])[0])

    def sample(self, step: Tensor, sampling: TrackSampling) -> Tensor:
        """The next id, int64 [1]."""
        uniform = self.uniforms[step]
        return sample(self.logits, self.store, step, uniform, sampling, self.first_id)

    def put(self, step: Tensor, chosen: Tensor) -> None:
        self.store.index_copy_(0, step, chosen)
        self.latest.copy_(chosen.view(1, 1))


class DecodeState:
    """What one request at a time needs on the device; made once, reused by later requests.

    ``cache_dtype`` is the dtype of the cache where it is not that of the model.
    """

    def __init__(
        self,
        model: LanguageModel,
        control: ControlTokens,
        capacity: int,
        backend: Backend,
        graphs: Graphs,
        cache_dtype: torch.dtype | None = None,
    ):
        device, blank = model.device, control.blank
        self.model, self.control, self.graphs = model, control, graphs
        cache = model.new_cache(capacity, cache_dtype)
        if graphs.captures:
            cache.clear()
        self.attention = CachedAttention(backend, cache)
        self.text = TrackState(model.text_head, 0, capacity, blank)
        self.audio = TrackState(model.audio_head, model.first_audio_id, capacity, blank)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.position = torch.zeros_like(self.step)
        self.text_finished = torch.zeros(1, dtype=torch.bool, device=device)
        self.finished = torch.zeros_like(self.text_finished)
        self.blank = torch.full((1,), blank, device=device)
        self.audio_ends = torch.tensor(control.audio_ends).to(device)
        self._forwards: dict[tuple[Tracks, int], Callable[[], None]] = {}
        self._choices: dict[tuple[Tracks, Sampling], Callable[[], None]] = {}

    def begin(self, randomness: Randomness, steps: int) -> None:
        """Forget the last request; draw for ``steps`` steps of this one."""
        self.text.reset(randomness.uniforms("text", steps), self.control.blank)
        self.audio.reset(randomness.uniforms("audio", steps), self.control.blank)
        for tensor in (self.step, self.position, self.text_finished, self.finished):
            tensor.zero_()

    def prefill(self, x: Tensor, tracks: Tracks) -> None:
        """Read the embedded prompt x [1, length, hidden_size]."""
        self._forward(x, tracks, self.attention.at(0))
        self.position += x.shape[1] - 1

    def forward(self, tracks: Tracks, position: int) -> None:
        """Logits of ``tracks`` after the ids chosen last, which stand at ``position``."""
        if not self.graphs.captures:
            self._forward(self._embed_latest(), tracks, self.attention.at(position))
            return
        key = tracks, self._extent(position)
        if key not in self._forwards:
            attend = self.attention.at_position(self.position, key[1])
            self._forwards[key] = self.graphs.record(
                lambda: self._forward(self._embed_latest(), tracks, attend)
            )
        self._forwards[key]()

    def _extent(self, position: int) -> int:
        capacity = self.attention.cache.capacity
        if self.attention.backend.reads_filled:
            return capacity
        return extent_of(position, capacity)

    def _embed_latest(self) -> Tensor:
        return self.model.embed(self.audio.latest, self.text.latest)

    def _forward(self, x: Tensor, tracks: Tracks, attend: Attend) -> None:
        hidden = self.model(x, attend, tracks.text, tracks.audio)
        if tracks.text:
            self.text.read_head(hidden.text)
        if tracks.audio:
            self.audio.read_head(hidden.audio)

    def prepare(self, tracks: Tracks, sampling: Sampling) -> None:
        """Record what :meth:`choose` will launch; only before :meth:`begin`, as it runs a step."""
        key = tracks, sampling
        if key in self._choices:
            return
        if len(self._choices) == KEPT_SAMPLINGS:
            del self._choices[next(iter(self._choices))]
        self.step.zero_()
        self._choices[key] = self.graphs.record(lambda: self._choose(tracks, sampling))

    def choose(self, tracks: Tracks, sampling: Sampling) -> None:
        """Choose and store the ids of this step, update the stop conditions, go to the next."""
        self._choices[tracks, sampling]()

    def _choose(self, tracks: Tracks, sampling: Sampling) -> None:
        running = ~self.finished
        text = audio = self.blank
        if tracks.text:
            sampled = self.text.sample(self.step, sampling.text)
            text = torch.where(self.text_finished, self.blank, sampled)
            ends = ~self.text_finished & (sampled == self.control.text_end)
            self.text.count += running & ~self.text_finished & ~ends
            self.text_finished |= ends
        if tracks.audio:
            speaking = self.step >= self.model.config.audio_delay
            sampled = self.audio.sample(self.step, sampling.audio)
            audio = torch.where(speaking, sampled, self.blank)
            self.audio.count += running & speaking
            self.finished |= speaking & (audio == self.audio_ends).any()
        else:
            self.finished |= self.text_finished
        self.text.put(self.step, text)
        self.audio.put(self.step, audio)
        self.step += 1
        self.position += 1

    def fetch(self, start: int, end: int) -> Callable[[], Snapshot]:
        """Begin to copy the counts, the flags and the ids of steps ``start`` to ``end``."""
        flags = torch.cat([self.text_finished, self.finished]).long()
        ids = self.text.store[start:end], self.audio.store[start:end]
        values = self.graphs.fetch(torch.cat([self.text.count, self.audio.count, flags, *ids]))

        def wait() -> Snapshot:
            text_count, audio_count, text_finished, finished, *ids = values()
            text, audio = ids[: end - start], ids[end - start :]
            return Snapshot(
                text_count, audio_count, bool(text_finished), bool(finished), text, audio
            )

        return wait


class Snapshot(NamedTuple):
    """The state at some step: counts of ids that count so far, and the ids of a span of steps."""

    text_count: int
    audio_count: int
    text_finished: bool
    finished: bool
    text: list[int]
    audio: list[int]
