"""The decode loop over both tracks, for all running requests at a time.

A step reads and writes only tensors on the device, with a row for each request: the logits of the
ids chosen last, the samplers, the delay of the audio track, blanks, stop conditions and the ids of
all steps. It needs nothing from the host, so where graphs are captured it is recorded once for each
number of rows and launched as a whole. A request alone is a batch of one.

Rows of running requests come first, without gaps. A prompt is read into a row behind all others,
which becomes one of them once the first ids are chosen.

The host launches steps and polls: it begins to copy what is new. Where steps are recorded it reads
the copy only after launching the next ones, so that the device never waits; a row that has ended
stays as it is.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kimia_infer.engine.generation import (
    AUDIO,
    BOTH,
    TEXT,
    ControlTokens,
    Generation,
    Progress,
    Rows,
    TrackRows,
    Tracks,
    narrowed,
)
from kimia_infer.engine.room import Room
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
    form_of,
    sample,
)
from kimia_infer.models.kimi_audio.language_model import Hidden, LanguageModel
from kimia_infer.utils.graphs import Graphs, graphs_for

PIECE = 512
"""Positions of a prompt that are read at once; steps of running requests go between."""


def recorded_batches(slots: int) -> list[int]:
    """Numbers of rows for which steps are recorded, of up to ``slots`` requests."""
    return [1 << n for n in range((slots - 1).bit_length() + 1)]


Forms = tuple[Form, Form]  # how text and audio are sampled in a step


class Decoder:
    """A language model that generates for up to ``slots`` requests at a time.

    A request and its answer fit in ``capacity`` positions. They share a key/value cache of
    ``places``, by default enough for all to be that long. ``attention`` names a backend instead
    of the best one, ``kv_cache`` is one of ``KV_CACHES``; ConfigurationError if they cannot be
    used. ``make_graphs`` decides how steps are launched. Without ``speaks`` it generates text
    alone, and the cache has no room for speech. Not to be used by two threads at once.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: LanguageModel,
        control: ControlTokens,
        capacity: int,
        attention: str | None = None,
        make_graphs: Callable[[torch.device], Graphs] = graphs_for,
        kv_cache: str = "none",
        buckets: Sequence[int] = BUCKETS,
        *,
        slots: int = 1,
        places: int | None = None,
        speaks: bool = True,
    ):
        self.model, self.control, self.capacity, self.slots = model, control, capacity, slots
        self.delay, self.speaks = model.config.audio_delay, speaks
        device = model.device
        check_kv_cache(kv_cache, device)
        self.kv_cache, self.graphs = kv_cache, make_graphs(device)
        self.backend = choose_backend(device, model.config.head_dim, attention)
        places = slots * capacity if places is None else places
        # One place more, for rows of nobody.
        cache = model.new_cache(places + 1, capacity, KV_CACHES[kv_cache], speaks)
        self.attention = CachedAttention(self.backend, cache)
        self.buckets = () if self.backend.reads_filled else buckets
        self.batches = recorded_batches(slots)
        # The row of the prompt comes after those of the largest step.
        self._prompt_row = self.batches[-1]
        self.rows = self._new_rows(places)
        self.room = Room(cache, self.rows, slots)
        self.running = self.room.running
        self._blank = torch.full((), control.blank, device=device)
        self._ends = torch.tensor(control.audio_ends).to(device)
        self._polls: deque[Callable[[], list[tuple[Generation, Progress]]]] = deque()
        self._forwards: dict[tuple[int, Tracks, int], Callable[[], None]] = {}
        self._choices: dict[tuple[int, Tracks, Forms], Callable[[], None]] = {}
        self._views: dict[tuple[int, int], Rows] = {}
        if self.graphs.captures:
            self._record()

    def _new_rows(self, places: int) -> Rows:
        size, model = (self._prompt_row + 1, self.capacity), self.model
        given = self.control.blank, model.device, model.dtype
        heads = model.text_head, model.audio_head
        rows = Rows.create(*(TrackRows.create(*size, h.out_features, *given) for h in heads))
        rows.start.fill_(places)
        return rows

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run a step of nobody, which no request then has to wait for."""
        self._forward(1, TEXT, self.attention.tokens([self.room.spans.places], [0]))

    def run(self, generation: Generation) -> Generator[Progress]:
        """Generate until the end token or the step limit, with nobody beside it.

        Raises FloatingPointError for logits that are not finite.
        """
        reading = self.begin(generation)
        try:
            for _ in reading:
                pass
            finished = False
            while not finished:
                for _, progress in self.step():
                    if generation.broken:
                        raise FloatingPointError("the logits of an answer are not finite")
                    yield progress
                    finished = progress.finished
        finally:
            self.release(generation)

    def begin(self, generation: Generation) -> Iterator[None]:
        """Read the prompt, piece by piece, and choose the first ids; then it is running.

        Raises ValueError if nothing is free. One prompt at a time. A generation that is released
        before the end of this iterator does not run.
        """
        if generation.speaks and not self.speaks:
            raise ValueError("this decoder generates text alone")
        return self._read(generation, self.room.take(generation))

    def _read(self, generation: Generation, start: int) -> Iterator[None]:
        tracks = generation.tracks
        with torch.inference_mode():
            x = self._embed(generation)
        rows = self._view(self._prompt_row, self._prompt_row + 1)
        for position in range(0, x.shape[1], PIECE):
            with torch.inference_mode():
                piece = x[:, position : position + PIECE]
                hidden = self.model(piece, self.attention.sequence(start, position), *tracks)
                if position + PIECE >= x.shape[1]:
                    self._read_heads(rows, hidden)
            yield
        with torch.inference_mode():
            self._start(generation, start)
            self._choose(rows, tracks, self._forms([generation], recorded=False))
            self.rows.move(self._prompt_row, len(self.running))
            self.running.append(generation)
            generation.launched = 1
            self._poll()

    def _embed(self, generation: Generation) -> Tensor:
        """The prompt [1, length, hidden_size]; its features are not needed any more."""
        prompt = generation.prompt
        generation.prompt = replace(prompt, features=None)
        ids = prompt.audio_ids, prompt.text_ids
        return self.model.embed(*ids, prompt.is_continuous, prompt.features)

    def _start(self, generation: Generation, start: int) -> None:
        """Set the row of the prompt, but for its logits."""
        rows, row, limit = self.rows, self._prompt_row, generation.max_steps
        sampling, draws = generation.sampling, generation.randomness
        rows.text.begin(row, sampling.text, draws.uniforms("text", limit))
        rows.audio.begin(row, sampling.audio, draws.uniforms("audio", limit))
        rows.start[row], rows.limit[row] = start, limit
        rows.position[row], rows.speaks[row] = generation.prompt.length - 1, generation.speaks
        for tensor in (rows.step, rows.text_ended, rows.ended, rows.finished, rows.broken):
            tensor[row] = 0

    @torch.inference_mode()
    def step(self) -> Iterator[tuple[Generation, Progress]]:
        """Launch steps up to the next poll, then read what earlier ones have brought."""
        self.room.arrange()
        count = 0 if self._polls and not self.graphs.captures else self._due()
        if count:
            for _ in range(count):
                self._launch()
            self._poll()
        elif self.running and not self._polls:  # the last poll failed
            self._poll()
        late = int(self.graphs.captures and count > 0)
        while len(self._polls) > late:
            yield from self._polls.popleft()()

    def _due(self) -> int:
        """Steps until a generation wants to be polled or is at its limit."""
        return min((g.due for g in self.running if g.launched < g.max_steps), default=0)

    def _launch(self) -> None:
        """A step of all rows: logits after the ids chosen last, then the next ids."""
        going = self.running
        tracks = Tracks(any(g.tracks.text for g in going), any(g.tracks.audio for g in going))
        forms = self._forms(going, self.graphs.captures)
        last = [g.positions_launched - 1 for g in going]
        if self.graphs.captures:
            batch = next(b for b in self.batches if b >= len(going))
            self._replay_forward(batch, tracks, self._bucket(max(last)))
            self._replay_choice(batch, tracks, forms)
        else:
            starts = [start for g in going if (start := self.room.starts[g]) is not None]
            self._forward(len(going), tracks, self.attention.tokens(starts, last))
            self._choose(self._view(0, len(going)), tracks, forms)
        for generation in going:
            generation.launched = min(generation.launched + 1, generation.max_steps)

    def _bucket(self, position: int) -> int:
        return bucket_of(position, self.capacity, self.buckets)

    def _forms(self, generations: Sequence[Generation], recorded: bool) -> Forms:
        return (
            form_of([g.sampling.text for g in generations], recorded),
            form_of([g.sampling.audio for g in generations], recorded),
        )

    def _view(self, first: int, end: int) -> Rows:
        if (first, end) not in self._views:
            self._views[first, end] = narrowed(self.rows, first, end)
        return self._views[first, end]

    def _forward(self, count: int, tracks: Tracks, attend: Attend) -> None:
        """Logits of ``tracks`` of the first ``count`` rows."""
        rows, model = self._view(0, count), self.model
        x = model.embed(rows.audio.latest, rows.text.latest)
        self._read_heads(rows, model(x, attend, *tracks))

    def _read_heads(self, rows: Rows, hidden: Hidden) -> None:
        """Logits of the last position of ``hidden``, of its tracks."""
        if hidden.text is not None:
            rows.text.logits.copy_(self.model.text_head(hidden.text[:, -1]))
        if hidden.audio is not None:
            rows.audio.logits.copy_(self.model.audio_head(hidden.audio[:, -1]))

    def _choose(self, rows: Rows, tracks: Tracks, forms: Forms) -> None:
        """Choose and store the ids of this step, update the stop conditions, go to the next."""
        running, step = ~rows.finished, rows.step
        text = audio = self._blank.expand_as(step)
        # A step whose samplers lack memory changes nothing, and can be launched again.
        first_audio = self.model.first_audio_id
        said = self._sample(rows.text, step, forms[0], 0) if tracks.text else text
        spoken = self._sample(rows.audio, step, forms[1], first_audio) if tracks.audio else audio
        if tracks.text:
            text = self._blank.where(rows.text_ended, said)
            ends = ~rows.text_ended & (said == self.control.text_end)
            rows.text.count += running & ~rows.text_ended & ~ends
            rows.broken |= running & ~rows.text_ended & ~_finite(rows.text.logits)
            rows.text_ended |= ends
        rows.ended |= running & rows.text_ended & ~rows.speaks
        if tracks.audio:
            speaking = rows.speaks & (step >= self.delay)
            audio = spoken.where(speaking, self._blank)
            rows.audio.count += running & speaking
            rows.broken |= running & speaking & ~_finite(rows.audio.logits)
            rows.ended |= running & speaking & (audio[:, None] == self._ends).any(1)
        rows.text.put(step, text)
        rows.audio.put(step, audio)
        rows.step += running
        rows.position += running
        rows.finished |= rows.ended | rows.broken | (rows.step >= rows.limit)

    def _sample(self, track: TrackRows, step: Tensor, form: Form, first_id: int) -> Tensor:
        uniform = track.uniforms.gather(1, step[:, None])[:, 0]
        return sample(track.logits, track.store, step, uniform, track.sampling, form, first_id)

    def _replay_forward(self, batch: int, tracks: Tracks, bucket: int) -> None:
        key = batch, tracks, bucket
        if key not in self._forwards:
            rows = self._view(0, batch)
            attend = self.attention.recorded_tokens(rows.start, rows.position, bucket)
            self._forwards[key] = self.graphs.record(lambda: self._forward(batch, tracks, attend))
        self._forwards[key]()

    def _replay_choice(self, batch: int, tracks: Tracks, forms: Forms) -> None:
        if not (tracks.text and tracks.audio):  # the other form is of no account
            forms = forms[tracks.audio], forms[tracks.audio]
        key = batch, tracks, forms
        if key not in self._choices:
            rows = self._view(0, batch)
            self._choices[key] = self.graphs.record(lambda: self._choose(rows, tracks, forms))
        self._choices[key]()

    def _record(self) -> None:
        """Record every step that requests may launch, on rows of nobody."""
        buckets = {self._bucket(b) for b in (0, *self.buckets)}
        for batch in self.batches:
            self._view(0, batch)  # outside of what is recorded
        kinds = (TEXT, BOTH, AUDIO) if self.speaks else (TEXT,)
        for batch, tracks in itertools.product(self.batches, kinds):
            for bucket in buckets:
                self._replay_forward(batch, tracks, bucket)
            for text, audio in itertools.product(RECORDED_FORMS, repeat=2):
                self._replay_choice(batch, tracks, (text, audio))

    def _poll(self) -> None:
        """Begin to fetch what is new of all running rows."""
        going = [(g, g.fetched, g.launched) for g in self.running]
        rows, width = self._view(0, len(going)), max(end - start for _, start, end in going)
        first = torch.tensor([start for _, start, _ in going]).to(self.model.device)
        places = first[:, None] + torch.arange(width, device=first.device)
        places = places.clamp(max=self.capacity)
        state = (rows.step, rows.text.count, rows.audio.count, rows.text_ended, rows.ended,
                 rows.finished, rows.broken)  # fmt: skip
        columns = [column.long()[:, None] for column in state]
        ids = [track.store.gather(1, places) for track in (rows.text, rows.audio)]
        copied = self.graphs.copy_to_host(torch.cat([*columns, *ids], 1))
        for generation in self.running:  # after all that may fail
            generation.fetched = generation.launched

        def wait() -> list[tuple[Generation, Progress]]:
            return [
                (generation, generation.take(row, start, width))
                for row, (generation, start, _) in zip(copied.wait().tolist(), going, strict=True)
                if generation in self.room.starts  # it may have been released since
            ]

        self._polls.append(wait)

    @torch.inference_mode()
    def reset(self) -> None:
        """Release all generations and forget what was launched, after a failure."""
        self._polls.clear()
        self.room.reset()
        for row in range(self._prompt_row):
            self.rows.clear(row, self.room.spans.places)

    @torch.inference_mode()
    def release(self, generation: Generation) -> None:
        """Free the slot of a generation, finished or not."""
        self.room.release(generation)


def _finite(logits: Tensor) -> Tensor:
    """Whether all logits [rows, ids] of each row are numbers, [rows]."""
    return logits.sum(-1, dtype=torch.float32).isfinite()
