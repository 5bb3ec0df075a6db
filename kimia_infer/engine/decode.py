"""The generation loop over both tracks, and its state on the device.

A step reads and writes only tensors on the device: the logits of the ids chosen last, both
samplers, the delay of the audio track, blanks, stop conditions and the ids of all steps. It needs
nothing from the host, so where graphs are captured it is recorded once and launched as a whole.

The host launches steps and, every ``poll_interval`` of them, begins to copy what is new. Where
steps are recorded it reads the copy only after launching the next interval, so that the device
never waits; steps that ran past the end are dropped.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from kimia_infer.layers.attention import (
    BUCKETS,
    KV_CACHES,
    Attend,
    CachedAttention,
    bucket_of,
    check_kv_cache,
    choose_backend,
)
from kimia_infer.layers.sampler import (
    RECORDED_FORMS,
    Form,
    Randomness,
    Sampling,
    SamplingRows,
    TrackSampling,
    draw_dtype,
    form_of,
    sample,
)
from kimia_infer.models.kimi_audio.language_model import LanguageModel
from kimia_infer.utils.graphs import Graphs, graphs_for

OutputType = Literal["text", "both"]


class Tracks(NamedTuple):
    """Which tracks a step computes."""

    text: bool
    audio: bool


Forms = tuple[Form, Form]  # how text and audio are sampled in a step

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


@dataclass(frozen=True)
class DecodeInput:
    """The prompt as the model reads it.

    audio_ids, text_ids int64 [1, length]; is_continuous bool [1, length]; features
    [continuous positions, adaptor_input_dim] or None when the prompt has no audio.
    """

    audio_ids: Tensor
    text_ids: Tensor
    is_continuous: Tensor | None = None
    features: Tensor | None = None

    @property
    def length(self) -> int:
        return self.audio_ids.shape[1]


@dataclass(frozen=True)
class Progress:
    """The result of a poll: new ids, and how far the generation is.

    ``text_ids`` exclude the end token; ``audio_ids`` begin after the delay, end token included.
    """

    steps: int
    text_ids: list[int]
    audio_ids: list[int]
    finished: bool


class TrackState:
    """One track: ids of all steps, their draws, the last id, and the logits of the next.

    ``store`` int64 and ``uniforms`` [1, capacity]; ``count`` int64 [1] of ids that belong to
    the answer; ``latest`` int64 [1, 1]; ``logits`` [1, ids] of the ids from ``first_id`` on.
    """

    def __init__(self, head: nn.Linear, first_id: int, capacity: int, blank: int):
        device, dtype = head.weight.device, head.weight.dtype
        self.head, self.first_id = head, first_id
        self.sampling = SamplingRows(1, device)
        self.store = torch.full((1, capacity), blank, device=device)
        self.uniforms = torch.zeros(1, capacity, dtype=draw_dtype(device), device=device)
        self.count = torch.zeros(1, dtype=torch.int64, device=device)
        self.latest = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self.logits = torch.zeros(1, head.weight.shape[0], dtype=dtype, device=device)

    def reset(self, sampling: TrackSampling, uniforms: Tensor, blank: int) -> None:
        self.sampling.put(0, sampling)
        self.store.fill_(blank)
        self.count.zero_()
        self.uniforms[0, : len(uniforms)] = uniforms

    def read_head(self, hidden: Tensor) -> None:
        """Logits of the last position of hidden [1, length, hidden_size]."""
        self.logits.copy_(self.head(hidden[:, -1]))

    def sample(self, step: Tensor, form: Form) -> Tensor:
        """The next id, int64 [1]."""
        rows = self.logits, self.store, step, self.uniforms[0, step], self.sampling
        return sample(*rows, form, self.first_id)

    def put(self, step: Tensor, chosen: Tensor) -> None:
        self.store.index_copy_(1, step, chosen.view(1, 1))
        self.latest.copy_(chosen.view(1, 1))


class DecodeState:
    """Everything on the device that one request at a time needs; later requests reuse it."""

    def __init__(
        self,
        model: LanguageModel,
        control: ControlTokens,
        attention: CachedAttention,
        graphs: Graphs,
        buckets: Sequence[int] = BUCKETS,
    ):
        device, blank, capacity = model.device, control.blank, attention.cache.capacity
        self.model, self.control, self.attention, self.graphs = model, control, attention, graphs
        if graphs.captures:
            attention.cache.clear()
        self.buckets = () if attention.backend.reads_filled else buckets
        self.text = TrackState(model.text_head, 0, capacity, blank)
        self.audio = TrackState(model.audio_head, model.first_audio_id, capacity, blank)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.position = torch.zeros_like(self.step)
        self.text_finished = torch.zeros(1, dtype=torch.bool, device=device)
        self.finished = torch.zeros_like(self.text_finished)
        self.blank = torch.full((1,), blank, device=device)
        self.audio_ends = torch.tensor(control.audio_ends).to(device)
        self._forwards: dict[tuple[Tracks, int], Callable[[], None]] = {}
        self._choices: dict[tuple[Tracks, Forms], Callable[[], None]] = {}
        if graphs.captures:
            self._record()

    def begin(self, sampling: Sampling, randomness: Randomness, steps: int) -> None:
        """Reset for a new request, with the random numbers of ``steps`` steps."""
        blank = self.control.blank
        self.text.reset(sampling.text, randomness.uniforms("text", steps), blank)
        self.audio.reset(sampling.audio, randomness.uniforms("audio", steps), blank)
        for tensor in (self.step, self.position, self.text_finished, self.finished):
            tensor.zero_()

    def prefill(self, x: Tensor, tracks: Tracks) -> None:
        """Read the embedded prompt x [1, length, hidden_size]."""
        self._forward(x, tracks, self.attention.at(0))
        self.position += x.shape[1] - 1

    def forward(self, tracks: Tracks, position: int) -> None:
        """Logits of ``tracks`` after the ids chosen last, which are at ``position``."""
        if not self.graphs.captures:
            self._forward_latest(tracks, self.attention.at(position))
            return
        key = tracks, bucket_of(position, self.attention.cache.capacity, self.buckets)
        if key not in self._forwards:
            attend = self.attention.at_position(self.position, key[1])
            self._forwards[key] = self.graphs.record(lambda: self._forward_latest(tracks, attend))
        self._forwards[key]()

    def _forward_latest(self, tracks: Tracks, attend: Attend) -> None:
        self._forward(self.model.embed(self.audio.latest, self.text.latest), tracks, attend)

    def _forward(self, x: Tensor, tracks: Tracks, attend: Attend) -> None:
        hidden = self.model(x, attend, tracks.text, tracks.audio)
        if tracks.text:
            self.text.read_head(hidden.text)
        if tracks.audio:
            self.audio.read_head(hidden.audio)

    def _record(self) -> None:
        """Record every step that a request may launch. Changes the state: never in a request."""
        for tracks in (TEXT, BOTH, AUDIO):
            for bucket in (0, *(b for b in self.buckets if b < self.attention.cache.capacity)):
                self.forward(tracks, bucket)
            for text, audio in itertools.product(RECORDED_FORMS, repeat=2):
                self.step.zero_()
                self.choose(tracks, (text, audio))

    def choose(self, tracks: Tracks, forms: Forms) -> None:
        """Choose and store the ids of this step, update the stop conditions, go to the next."""
        if not (tracks.text and tracks.audio):  # the other form is of no account
            forms = (forms[tracks.audio],) * 2
        if (tracks, forms) not in self._choices and self.graphs.captures:
            self._choices[tracks, forms] = self.graphs.record(lambda: self._choose(tracks, forms))
        self._choices.get((tracks, forms), lambda: self._choose(tracks, forms))()

    def _choose(self, tracks: Tracks, forms: Forms) -> None:
        running = ~self.finished
        text = audio = self.blank
        if tracks.text:
            sampled = self.text.sample(self.step, forms[0])
            text = torch.where(self.text_finished, self.blank, sampled)
            ends = ~self.text_finished & (sampled == self.control.text_end)
            self.text.count += running & ~self.text_finished & ~ends
            self.text_finished |= ends
        if tracks.audio:
            speaking = self.step >= self.model.config.audio_delay
            sampled = self.audio.sample(self.step, forms[1])
            audio = torch.where(speaking, sampled, self.blank)
            self.audio.count += running & speaking
            self.finished |= speaking & (audio == self.audio_ends).any()
        else:
            self.finished |= self.text_finished
        self.text.put(self.step, text)
        self.audio.put(self.step, audio)
        self.step += 1
        self.position += 1

    def fetch(self, start: int, end: int) -> Callable[[], list[int]]:
        """Begin to copy what :meth:`Generation.run` polls, the ids of steps ``start`` to ``end``.

        The values are the counts of text and audio ids that belong to the answer, the flags
        ``text_finished`` and ``finished``, then the text ids and the audio ids.
        """
        flags = torch.cat([self.text_finished, self.finished]).long()
        ids = self.text.store[0, start:end], self.audio.store[0, start:end]
        return self.graphs.fetch(torch.cat([self.text.count, self.audio.count, flags, *ids]))


class Decoder:
    """A language model ready to generate, with the states that requests take turns to use.

    A request and its answer fit in ``capacity`` positions. ``attention`` names a backend instead
    of the best one, ``kv_cache`` is one of ``KV_CACHES``; ConfigurationError if they cannot be
    used. ``make_graphs`` decides how steps are launched.
    """

    def __init__(
        self,
        model: LanguageModel,
        control: ControlTokens,
        capacity: int,
        attention: str | None = None,
        make_graphs: Callable[[torch.device], Graphs] = graphs_for,
        kv_cache: str = "none",
        buckets: Sequence[int] = BUCKETS,
    ):
        self.model, self.control, self.capacity = model, control, capacity
        check_kv_cache(kv_cache, model.device)
        self.kv_cache, self.cache_dtype, self.buckets = kv_cache, KV_CACHES[kv_cache], buckets
        self.backend = choose_backend(
            model.device, model.dtype, model.config.head_dim, attention, self.cache_dtype
        )
        self._make_graphs = make_graphs
        self._free: list[DecodeState] = []

    @contextlib.contextmanager
    def borrow(self) -> Iterator[DecodeState]:
        """A state that nobody else uses; it is dropped if this request fails, else kept."""
        try:
            state = self._free.pop()
        except IndexError:
            cache = self.model.new_cache(self.capacity, self.cache_dtype)
            attention = CachedAttention(self.backend, cache)
            graphs = self._make_graphs(self.model.device)
            state = DecodeState(self.model, self.control, attention, graphs, self.buckets)
        usable = True
        try:
            yield state
        except Exception:
            usable = False
            raise
        finally:
            if usable:
                self._free.append(state)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Make the first state, which no request then has to wait for, and run a step of it."""
        with self.borrow() as state:
            state.forward(TEXT, 0)


class Generation:
    """One request on its way through the model.

    Iterate :meth:`run` to the end, or stop early; ``text_ids`` and ``audio_ids`` grow with it.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompt: DecodeInput,
        output_type: OutputType,
        max_steps: int,
        sampling: Sampling,
        randomness: Randomness,
        poll_interval: int = 1,
    ):
        needed = prompt.length + max_steps
        if needed > decoder.capacity:
            raise ValueError(f"{needed} positions do not fit in a capacity of {decoder.capacity}")
        self.decoder, self.prompt, self.randomness = decoder, prompt, randomness
        self.sampling, self.max_steps, self.poll_interval = sampling, max_steps, poll_interval
        self.next_poll = 1
        self.delay = decoder.model.config.audio_delay
        self.tracks = BOTH if output_type == "both" else TEXT
        self.speaks = self.tracks.audio
        self.launched, self.fetched, self.ended = 0, 0, False
        self.text_ids: list[int] = []
        self.audio_ids: list[int] = []

    @torch.inference_mode()
    def run(self) -> Generator[Progress]:
        """Generate until the end token or the step limit; poll every ``poll_interval`` steps."""
        with self.decoder.borrow() as state:
            sampling, recorded = self.sampling, state.graphs.captures
            forms = form_of([sampling.text], recorded), form_of([sampling.audio], recorded)
            state.begin(sampling, self.randomness, self.max_steps)
            polls: deque[Callable[[], Progress]] = deque()
            while True:
                self._launch(state, forms)
                polls.append(self._poll(state))
                if state.graphs.captures and len(polls) == 1 and self.launched < self.max_steps:
                    continue  # one interval late
                progress = polls.popleft()()
                yield progress
                if progress.finished:
                    return

    def poll_by(self, step: int) -> None:
        """Poll after ``step`` launched steps at the latest."""
        self.next_poll = min(self.next_poll, max(step, self.launched + 1))

    def _launch(self, state: DecodeState, forms: Forms) -> None:
        """Launch steps up to the next poll."""
        until = min(self.next_poll, self.max_steps)
        while self.launched < until:
            if self.launched == 0:
                prompt = self.prompt
                ids = prompt.audio_ids, prompt.text_ids
                x = self.decoder.model.embed(*ids, prompt.is_continuous, prompt.features)
                state.prefill(x, self.tracks)
            else:
                state.forward(self.tracks, self.prompt.length + self.launched - 1)
            state.choose(self.tracks, forms)
            self.launched += 1
        self.next_poll = self.launched + self.poll_interval

    def _poll(self, state: DecodeState) -> Callable[[], Progress]:
        """Begin to fetch the state as it is after the steps launched so far."""
        first, self.fetched = self.fetched, self.launched
        steps, values = self.launched, state.fetch(first, self.launched)
        return lambda: self._take(values(), first, steps)

    def _take(self, values: list[int], first: int, steps: int) -> Progress:
        """Keep the ids from step ``first`` on that belong to the answer."""
        text_count, audio_count, text_finished, finished, *ids = values
        text, audio = ids[: steps - first], ids[steps - first :]
        text = text[: max(0, text_count - first)]
        skipped = max(0, self.delay - first)
        audio = audio[skipped : max(0, audio_count + self.delay - first)]
        self.text_ids += text
        self.audio_ids += audio
        if self.speaks and text_finished:
            self.tracks = AUDIO
        self.ended = bool(finished)
        return Progress(steps, text, audio, self.ended or steps == self.max_steps)

    @property
    def steps(self) -> int:
        """Steps up to the end of the answer; more may have been launched before it was seen."""
        if not self.ended:
            return self.launched
        return self.delay + len(self.audio_ids) if self.speaks else len(self.text_ids) + 1
