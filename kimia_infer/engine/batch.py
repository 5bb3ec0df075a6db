"""Answers in text that are generated together, each at its own place: continuous batching.

A slot is a row of every tensor here. Prompts are read one at a time into a slot that is free;
then all slots advance by one token a step, those without a request computing what nobody reads.
A step needs nothing from the host, so where graphs are captured it is recorded once for each
extent. The ids of a row are those that :class:`Generation` finds alone, up to the rounding of
products of more rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kimia_infer.engine.decode import Decoder, Generation, Progress
from kimia_infer.engine.state import extent_of
from kimia_infer.layers.attention import BACKENDS, KV_CACHES, CachedAttention
from kimia_infer.layers.sampler import TrackSampling, draw_dtype, sample
from kimia_infer.utils.graphs import Graphs, graphs_for


class Batch:
    """Up to ``slots`` generations of text that advance together, sampled alike.

    ``check_interval`` steps are launched between looks. All memory is taken here:
    :attr:`slot_bytes` for each slot's keys and values of the decoder's capacity. Attention of a
    step is PyTorch's on every device.
    """

    @torch.inference_mode()
    def __init__(
        self,
        decoder: Decoder,
        slots: int,
        sampling: TrackSampling,
        check_interval: int = 1,
        make_graphs: Callable[[torch.device], Graphs] = graphs_for,
    ):
        self.decoder, self.sampling, self.check_interval = decoder, sampling, check_interval
        self.model, self.graphs = decoder.model, make_graphs(decoder.model.device)
        model, device, capacity = self.model, decoder.model.device, decoder.capacity
        self.cache = model.new_cache(capacity, KV_CACHES[decoder.kv_cache], slots, mimo=False)
        self.cache.clear()
        self.generations: list[Generation | None] = [None] * slots

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(slots, *shape, dtype=dtype, device=device)

        # A row that is finished stays where it is, one step behind its last.
        self.store = zeros(capacity + 1)
        self.uniforms = zeros(capacity + 1, dtype=draw_dtype(device))
        self.logits = zeros(model.text_head.weight.shape[0], dtype=model.dtype)
        self.step, self.position, self.limit, self.seen = (zeros() for _ in range(4))
        self.latest = zeros(1)
        self.ended, self.finished = zeros(dtype=torch.bool), ~zeros(dtype=torch.bool)
        self.blanks = torch.full_like(self.latest, decoder.control.blank)
        self._choose_next = self.graphs.record(self._choose)
        self._forwards: dict[int, Callable[[], None]] = {}

    @property
    def slot_bytes(self) -> int:
        """What the keys and values of a slot take."""
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
        """Read the prompt of a generation that has not begun into a free slot, which it names.

        Raises ValueError if none is free, or for a generation of speech or with other sampling.
        """
        if self.full:
            raise ValueError("no slot is free")
        if generation.speaks or generation.sampling.text != self.sampling:
            raise ValueError("a batch generates text, and samples it in one way")
        slot, prompt, limit = self.generations.index(None), generation.prompt, generation.max_steps
        ids = prompt.audio_ids, prompt.text_ids
        x = self.model.embed(*ids, prompt.is_continuous, prompt.features)
        attention = CachedAttention(self.decoder.backend, self.cache.slot(slot))
        hidden = self.model(x, attention.at(0), text=True, audio=False)
        self.logits[slot] = self.model.text_head(hidden.text[0, -1:])[0]
        self.uniforms[slot, :limit] = generation.randomness.uniforms("text", limit)
        self.position[slot], self.limit[slot] = prompt.length - 1, limit
        for tensor in (self.step, self.seen, self.ended, self.finished):
            tensor[slot] = 0
        self.generations[slot] = generation
        return slot

    @torch.inference_mode()
    def advance(self) -> list[tuple[int, Progress]]:
        """Launch steps up to the next look; what it brought, by slot.

        The ids are added to the generations. One that is finished keeps its slot until it is
        released.
        """
        for step in range(self.check_interval):
            if step:
                self._forward_next(step - 1)
            self._choose_next()
        look = self._look()
        self._forward_next(self.check_interval - 1)  # while the host waits for the look
        return look()

    @torch.inference_mode()
    def release(self, slot: int) -> None:
        """Free a slot, whether or not its generation is finished."""
        self.generations[slot] = None
        self.finished[slot] = True

    def _choose(self) -> None:
        """Choose and store the next id of every row, and go on where it does not end there."""
        at = self.step[:, None]
        drawn = self.uniforms.gather(1, at)
        choose = torch.vmap(lambda *row: sample(*row, self.sampling))
        self.latest.copy_(choose(self.logits, self.store, at, drawn))
        self.store.scatter_(1, at, self.latest)
        running = ~self.finished
        ends = running & (self.latest[:, 0] == self.decoder.control.text_end)
        self.ended |= ends
        self.step += running
        self.position += running
        self.finished |= ends | (self.step >= self.limit)

    def _forward_next(self, launched: int) -> None:
        """Logits after the ids chosen last, so many steps and one after the last look."""
        capacity = self.cache.capacity
        taken = (g for g in self.generations if g is not None)
        last = max((g.prompt.length + g.launched for g in taken), default=0) + launched
        if not self.graphs.captures:
            self._forward(min(last + 1, capacity))
            return
        extent = extent_of(last, capacity)
        if extent not in self._forwards:
            self._forwards[extent] = self.graphs.record(lambda: self._forward(extent))
        self._forwards[extent]()

    def _forward(self, extent: int) -> None:
        x = self.model.embed(self.blanks, self.latest)
        attention = CachedAttention(BACKENDS["sdpa"], self.cache)
        attend = attention.at_position(self.position, extent)
        hidden = self.model(x, attend, text=True, audio=False)
        self.logits.copy_(self.model.text_head(hidden.text[:, -1]))

    def _look(self) -> Callable[[], list[tuple[int, Progress]]]:
        """Begin to fetch what is new since the last look."""
        places = self.seen[:, None] + torch.arange(self.check_interval, device=self.seen.device)
        ids = self.store.gather(1, places.clamp(max=self.store.shape[1] - 1))
        columns = [self.step - self.seen, self.ended, self.finished]
        new = torch.cat([torch.stack([column.long() for column in columns], 1), ids], 1)
        self.seen.copy_(self.step)
        values = self.graphs.fetch(new.flatten())

        def wait() -> list[tuple[int, Progress]]:
            rows = torch.tensor(values()).view(len(self.generations), -1).tolist()
            return [(slot, self._take(slot, *rows[slot])) for slot in self.running]

        return wait

    def _take(self, slot: int, steps: int, ended: int, finished: int, *ids: int) -> Progress:
        generation = self.generations[slot]
        generation.launched += steps
        generation.ended = bool(ended)
        new = list(ids[: max(0, steps - ended)])  # none after its end, if it was not released
        generation.text_ids += new
        return Progress(generation.launched, new, [], bool(finished))
