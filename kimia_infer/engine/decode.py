"""The generation loop over both tracks.

The host launches steps and, every ``check_interval`` of them, begins to copy what is new. Where
work is recorded it reads the copy only after launching the next interval, so that the device
never waits, and trims what ran past the end.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kimia_infer.engine.state import (
    AUDIO,
    BOTH,
    TEXT,
    ControlTokens,
    DecodeState,
    Snapshot,
)
from kimia_infer.layers.attention import KV_CACHES, check_kv_cache, choose_backend
from kimia_infer.layers.sampler import Randomness, Sampling
from kimia_infer.models.kimi_audio.language_model import LanguageModel
from kimia_infer.utils.graphs import Graphs, graphs_for

OutputType = Literal["text", "both"]


class Decoder:
    """A language model ready to generate, with the states that requests take turns to use.

    A request and its answer fit in ``capacity`` positions. ``attention`` names a backend instead
    of the best one; ConfigurationError if it cannot be used. ``make_graphs`` is how work is
    launched. ``kv_cache`` is one of ``KV_CACHES``.
    """

    def __init__(
        self,
        model: LanguageModel,
        control: ControlTokens,
        capacity: int,
        attention: str | None = None,
        make_graphs: Callable[[torch.device], Graphs] = graphs_for,
        kv_cache: str = "none",
    ):
        config, dtype = model.config, model.dtype
        self.model, self.control, self.capacity = model, control, capacity
        check_kv_cache(kv_cache, model.device)
        self.kv_cache, self._cache_dtype = kv_cache, KV_CACHES[kv_cache]
        self.backend = choose_backend(
            model.device, dtype, config.head_dim, attention, self._cache_dtype
        )
        self._make_graphs = make_graphs
        self._free: list[DecodeState] = []

    @contextlib.contextmanager
    def borrow(self) -> Iterator[DecodeState]:
        """A state that nobody else uses, kept for later requests unless this one fails."""
        try:
            state = self._free.pop()
        except IndexError:
            graphs = self._make_graphs(self.model.device)
            state = DecodeState(
                self.model, self.control, self.capacity, self.backend, graphs, self._cache_dtype
            )
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
    def warm_up(self, sampling: Sampling, speech: bool) -> None:
        """Record the steps that ``sampling`` needs, so that no request has to wait for it."""
        with self.borrow() as state:
            for tracks in (TEXT, BOTH, AUDIO) if speech else (TEXT,):
                state.prepare(tracks, sampling)
                state.forward(tracks, 0)


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
    """What a look at the loop brought: ids that are new, and how far it is.

    ``text_ids`` exclude the end token; ``audio_ids`` begin after the delay, end token included.
    """

    steps: int
    text_ids: list[int]
    audio_ids: list[int]
    finished: bool


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
        check_interval: int = 1,
    ):
        needed = prompt.length + max_steps
        if needed > decoder.capacity:
            raise ValueError(f"{needed} positions do not fit in a capacity of {decoder.capacity}")
        self.decoder, self.prompt, self.randomness = decoder, prompt, randomness
        self.sampling, self.max_steps = sampling, max_steps
        self.check_interval, self.next_look = check_interval, 1
        self.delay = decoder.model.config.audio_delay
        self.tracks = BOTH if output_type == "both" else TEXT
        self.speaks = self.tracks.audio
        self.launched = self.fetched = 0
        self.ended = False
        self.text_ids: list[int] = []
        self.audio_ids: list[int] = []

    @torch.inference_mode()
    def run(self) -> Iterator[Progress]:
        """Generate until the end token or the step limit; look every ``check_interval`` steps."""
        with self.decoder.borrow() as state:
            for tracks in (BOTH, AUDIO) if self.speaks else (TEXT,):
                state.prepare(tracks, self.sampling)
            state.begin(self.randomness, self.max_steps)
            looks: deque[Callable[[], Progress]] = deque()
            while True:
                self._launch(state)
                looks.append(self._look(state))
                if state.graphs.captures and len(looks) == 1 and self.launched < self.max_steps:
                    continue  # one interval late
                progress = looks.popleft()()
                yield progress
                if progress.finished:
                    return

    def look_by(self, step: int) -> None:
        """Have the next look at ``step`` launched steps, if it is not due earlier."""
        self.next_look = min(self.next_look, max(step, self.launched + 1))

    def _launch(self, state: DecodeState) -> None:
        """Launch steps up to the next look."""
        until = min(self.next_look, self.max_steps)
        while self.launched < until:
            if self.launched == 0:
                prompt = self.prompt
                ids = prompt.audio_ids, prompt.text_ids
                x = self.decoder.model.embed(*ids, prompt.is_continuous, prompt.features)
                state.prefill(x, self.tracks)
            else:
                state.forward(self.tracks, self.prompt.length + self.launched - 1)
            state.choose(self.tracks, self.sampling)
            self.launched += 1
        self.next_look = self.launched + self.check_interval

    def _look(self, state: DecodeState) -> Callable[[], Progress]:
        """Begin to fetch the state as it is after the steps launched so far."""
        first, self.fetched = self.fetched, self.launched
        steps, snapshot = self.launched, state.fetch(first, self.launched)
        return lambda: self._take(snapshot(), first, steps)

    def _take(self, seen: Snapshot, first: int, steps: int) -> Progress:
        """Keep what belongs to the answer of the ids from step ``first`` on."""
        text = seen.text[: max(0, seen.text_count - first)]
        skipped = max(0, self.delay - first)
        audio = seen.audio[skipped : max(0, seen.audio_count + self.delay - first)]
        self.text_ids += text
        self.audio_ids += audio
        if self.speaks and seen.text_finished:
            self.tracks = AUDIO
        self.ended = seen.finished
        return Progress(steps, text, audio, seen.finished or steps == self.max_steps)

    @property
    def steps(self) -> int:
        """Steps up to the end of the answer; more may have been launched before it was seen."""
        if not self.ended:
            return self.launched
        if self.speaks:
            return self.delay + len(self.audio_ids)
        return len(self.text_ids) + 1
