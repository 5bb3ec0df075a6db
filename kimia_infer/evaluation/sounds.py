"""The sounds of items, loaded ahead in a thread while the model answers."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from kimia_infer.audio.decode import SAMPLE_RATE, AudioError, load_audio
from kimia_infer.evaluation.items import Item

AHEAD = 4
"""Items whose sounds may be in memory before it is their turn."""


@dataclass(frozen=True)
class Loaded:
    """The sounds of an item by message, float32 [samples] at 16 kHz, and the seconds it took.

    ``error`` says what is wrong with them, None if nothing is.
    """

    waves: dict[int, np.ndarray]
    seconds: float
    error: AudioError | None = None


class _Loader:
    """Loads sounds; the last file that was cut is kept, as the next part often follows it."""

    def __init__(self, max_seconds: float):
        self.max_seconds = max_seconds
        self._cut: tuple[str, np.ndarray] | None = None

    def load(self, item: Item) -> Loaded:
        started = time.perf_counter()
        waves: dict[int, np.ndarray] = {}
        error = None
        try:
            for index, path in item.sounds.items():
                waves[index] = (
                    load_audio(path, self.max_seconds)
                    if item.span is None
                    else self._part(path, *item.span)
                )
        except AudioError as reason:
            error = reason
        return Loaded(waves, time.perf_counter() - started, error)

    def _part(self, path: str, start: float, end: float) -> np.ndarray:
        if self._cut is None or self._cut[0] != path:
            self._cut = None  # before the next one is loaded
            self._cut = path, load_audio(path)
        wave = self._cut[1]
        part = wave[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)]
        if not part.size:
            length = len(wave) / SAMPLE_RATE
            raise AudioError(f"{path}: ends at {length:.2f} s, before {start:g} to {end:g} s")
        return part


def load_ahead(items: Sequence[Item], max_seconds: float) -> Iterator[tuple[Item, Loaded]]:
    """Every item with its sounds, in order; those of the next few are loaded in a thread.

    A whole sound longer than ``max_seconds`` is refused without being decoded further. Closing
    the iterator stops the loading.
    """
    loader, waiting = _Loader(max_seconds), deque[tuple[Item, Future[Loaded]]]()
    rest = iter(items)
    pool = ThreadPoolExecutor(1, "sounds")  # one: the loader is used by one item at a time
    try:
        while True:
            while len(waiting) < AHEAD and (item := next(rest, None)) is not None:
                waiting.append((item, pool.submit(loader.load, item)))
            if not waiting:
                return
            item, future = waiting.popleft()
            yield item, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
