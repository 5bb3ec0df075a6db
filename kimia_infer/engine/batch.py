"""Continuous batching of answers in text, each at its own position.

A slot is a row of every tensor here. Prompts are read one at a time into a free slot; then all
slots advance by one token per step, also those without a request, whose tokens nobody reads. A
step needs nothing from the host, so where graphs are captured it is recorded once per bucket. The
ids of a row are those that :class:`Generation` finds alone, up to the rounding of larger matrix
products.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from kimia_infer.engine.decode import Decoder, Generation, Progress
from kimia_infer.layers.attention import BACKENDS, CachedAttention, bucket_of
from kimia_infer.layers.sampler import (
    RECORDED_FORMS,
    Form,
    SamplingRows,
    draw_dtype,
    form_of,
    sample,
)
from kimia_infer.utils.graphs import Graphs, graphs_for


class TextBatch:
    """Up to ``slots`` generations of text that advance together, each with its own sampling.

    ``poll_interval`` steps are launched between polls. All memory is allocated here:
    :attr:`slot_bytes` for the keys and values of each slot, at the capacity of the decoder. A step
    uses PyTorch's attention on every device.
    """

    @torch.inference_mode()
    def __init__(
        self,
        decoder: Decoder,
        slots: int,
        poll_interval: int = 1,
        make_graphs: Callable[[torch.device], Graphs] = graphs_for,
    ):
        self.decoder, self.poll_interval = decoder, poll_interval
        self.model, self.graphs = decoder.model, make_graphs(decoder.model.device)
        model, device, capacity = self.model, decoder.model.device, decoder.capacity
        self.cache = model.new_cache(capacity, decoder.cache_dtype, slots, mimo=False)
        self.cache.clear()
        self.generations: list[Generation | None] = [None] * slots

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(slots, *shape, dtype=dtype, device=device)

        # A finished row stays one step behind its last id.
        self.store = zeros(capacity + 1)
        self.uniforms = zeros(capacity + 1, dtype=draw_dtype(device))
        self.logits = zeros(model.text_head.weight.shape[0], dtype=model.dtype)
        self.step, self.position, self.limit, self.seen = (zeros() for _ in range(4))
        self.latest = zeros(1)
        self.ended, self.finished = zeros(dtype=torch.bool), ~zeros(dtype=torch.bool)
        self.blanks = torch.full_like(self.latest, decoder.control.blank)
        self.sampling = SamplingRows(slots, device)
        # Unused where nothing is recorded.
        self._choices = {
            form: self.graphs.record(functools.partial(self._choose, form))
            for form in RECORDED_FORMS
        }
        self._forwards: dict[int, Callable[[], None]] = {}

    @property
    def slot_bytes(self) -> int:
        """Bytes of the keys and values of a slot."""
        return (self.cache.keys.nbytes + self.cache.values.nbytes) // len(self.generations)

    @property
    def running(self) -> list[int]:
        """The slots that are taken."""
        return [s for s, generation in enumerate(self.generations) if generation is not None]

    @property
    def full(self) -> bool:
        return None not in self.generations

    @torch.inference_mode()
    def begin(self, generation: Generation) -> int:
        """Read the prompt of a generation that has not begun into a free slot; returns the slot.

        Raises ValueError if none is free, or for a generation of speech.
        """
        if self.full:
            raise ValueError("no slot is free")
        if generation.speaks:
            raise ValueError("a batch generates text")
        slot, prompt, limit = self.generations.index(None), generation.prompt, generation.max_steps
        ids = prompt.audio_ids, prompt.text_ids
        x = self.model.embed(*ids, prompt.is_continuous, prompt.features)
        attention = CachedAttention(self.decoder.backend, self.cache.slot(slot))
        hidden = self.model(x, attention.at(0), text=True, audio=False)
        self.logits[slot] = self.model.text_head(hidden.text[0, -1:])[0]
        self.uniforms[slot, :limit] = generation.randomness.uniforms("text", limit)
        self.sampling.put(slot, generation.sampling.text)
        self.position[slot], self.limit[slot] = prompt.length - 1, limit
        for tensor in (self.step, self.seen, self.ended, self.finished):
            tensor[slot] = 0
        self.generations[slot] = generation
        return slot

    @torch.inference_mode()
    def advance(self) -> list[tuple[int, Progress]]:
        """Launch steps up to the next poll; the progress of each slot that is taken.

        The ids are added to the generations. A finished generation keeps its slot until it is
        released.
        """
        for step in range(self.poll_interval):
            if step:
                self._forward_next(step - 1)
            self._choose_next()
        poll = self._poll()
        self._forward_next(self.poll_interval - 1)  # while the host waits for the poll
        return poll()

    @torch.inference_mode()
    def release(self, slot: int) -> None:
        """Free a slot, whether or not its generation is finished."""
        self.generations[slot] = None
        self.finished[slot] = True

    def _choose_next(self) -> None:
        """Launch :meth:`_choose` in the form that the generations of all slots need."""
        taken = [g.sampling.text for g in self.generations if g is not None]
        form = form_of(taken, recorded=self.graphs.captures)
        if self.graphs.captures:
            self._choices[form]()
        else:
            self._choose(form)

    def _choose(self, form: Form) -> None:
        """Choose and store the next id of every row; advance the rows that do not end with it."""
        at = self.step[:, None]
        uniform = self.uniforms.gather(1, at)[:, 0]
        chosen = sample(self.logits, self.store, self.step, uniform, self.sampling, form)
        self.latest.copy_(chosen[:, None])
        self.store.scatter_(1, at, self.latest)
        running = ~self.finished
        ends = running & (self.latest[:, 0] == self.decoder.control.text_end)
        self.ended |= ends
        self.step += running
        self.position += running
        self.finished |= ends | (self.step >= self.limit)

    def _forward_next(self, launched: int) -> None:
        """Logits after the ids chosen last, ``launched`` + 1 steps after the last poll."""
        capacity = self.cache.capacity
        taken = (g for g in self.generations if g is not None)
        last = max((g.prompt.length + g.launched for g in taken), default=0) + launched
        if not self.graphs.captures:
            self._forward(min(last + 1, capacity))
            return
        bucket = bucket_of(last, capacity, self.decoder.buckets)
        if bucket not in self._forwards:
            self._forwards[bucket] = self.graphs.record(lambda: self._forward(bucket))
        self._forwards[bucket]()

    def _forward(self, bucket: int) -> None:
        x = self.model.embed(self.blanks, self.latest)
        attention = CachedAttention(BACKENDS["sdpa"], self.cache)
        attend = attention.at_position(self.position, bucket)
        hidden = self.model(x, attend, text=True, audio=False)
        self.logits.copy_(self.model.text_head(hidden.text[:, -1]))

    def _poll(self) -> Callable[[], list[tuple[int, Progress]]]:
        """Begin to fetch what is new since the last poll."""
        places = self.seen[:, None] + torch.arange(self.poll_interval, device=self.seen.device)
        ids = self.store.gather(1, places.clamp(max=self.store.shape[1] - 1))
        columns = [self.step - self.seen, self.ended, self.finished]
        new = torch.cat([torch.stack([column.long() for column in columns], 1), ids], 1)
        self.seen.copy_(self.step)
        values = self.graphs.fetch(new.flatten())

        def wait() -> list[tuple[int, Progress]]:
            found, width = values(), new.shape[1]
            rows = [found[start : start + width] for start in range(0, len(found), width)]
            return [(slot, self._take(slot, *rows[slot])) for slot in self.running]

        return wait

    def _take(self, slot: int, steps: int, ended: int, finished: int, *ids: int) -> Progress:
        generation = self.generations[slot]
        assert generation is not None, "the slot is taken"
        generation.launched += steps
        generation.ended = bool(ended)
        new = list(ids[: max(0, steps - ended)])  # none after its end, if it was not released
        generation.text_ids += new
        return Progress(generation.launched, new, [], bool(finished))
