"""Where to cut a long recording: at its quietest points, while it is being decoded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from kimia_infer.audio.files import SAMPLE_RATE

LONGEST_SECONDS = 30.0
"""Longest segment: the input length of both audio encoders (published configuration)."""

SEARCH_SECONDS = 5.0
"""The cut is searched in the last seconds of a segment. Speakers pause more often than that."""

SHORTEST_SECONDS = 1.0
"""Shortest segment, as models invent text for very short audio."""

BLOCK_SECONDS = 0.01
WINDOW_BLOCKS = 10
"""Short-time energy: over 100 ms, about a syllable, every 10 ms."""


def split_at_quiet(
    blocks: Iterable[np.ndarray],
    sample_rate: int = SAMPLE_RATE,
    longest: float = LONGEST_SECONDS,
    search: float = SEARCH_SECONDS,
    shortest: float = SHORTEST_SECONDS,
) -> Iterator[tuple[int, np.ndarray]]:
    """Cut a stream of blocks [samples] into segments of at most ``longest`` seconds.

    Yields where each begins, in samples, and its samples. They cover the recording in order,
    without gaps or overlap, wherever the blocks end. Each but the last ends in the middle of the
    quietest 100 ms (the latest of equals) of its last ``search`` seconds, and has at least
    ``shortest`` seconds, as has the next one. Only a recording that is shorter is a shorter
    segment. No more than one segment, ``shortest`` and a block are held in memory.

    Raises:
        ValueError: unless ``shortest + 0.2 <= search <= longest`` and ``2 * shortest <= longest``.
    """
    room = shortest + 2 * WINDOW_BLOCKS * BLOCK_SECONDS
    if not room <= search <= longest or longest < 2 * shortest:
        raise ValueError(f"cannot search {search} s of {longest} s, leaving {shortest} s")
    most, region, least = (round(seconds * sample_rate) for seconds in (longest, search, shortest))
    block_size = round(BLOCK_SECONDS * sample_rate)

    def cut(held: np.ndarray) -> int:
        begin, end = max(most - region, least), min(most, len(held) - least)
        return begin + _quietest(held[begin:end], block_size)

    start, parts, size = 0, [], 0
    for block in blocks:
        parts.append(block)
        size += len(block)
        if size < most + least:  # what follows may matter
            continue
        held = np.concatenate(parts)
        while len(held) >= most + least:
            place = cut(held)
            yield start, held[:place]
            start, held = start + place, held[place:]
        parts, size = [held], len(held)
    held = np.concatenate(parts) if parts else np.empty(0, np.float32)
    while len(held) > most:
        place = cut(held)
        yield start, held[:place]
        start, held = start + place, held[place:]
    if held.size:
        yield start, held


def _quietest(samples: np.ndarray, block: int) -> int:
    """The middle of the window with the least energy; of all samples if they are no window."""
    blocks = samples[: len(samples) // block * block].reshape(-1, block)
    if len(blocks) < WINDOW_BLOCKS:
        return len(samples) // 2
    energy = np.square(blocks, dtype=np.float64).sum(axis=1)
    windows = np.lib.stride_tricks.sliding_window_view(energy, WINDOW_BLOCKS).sum(axis=1)
    latest = len(windows) - 1 - int(np.argmin(windows[::-1]))
    return (latest + WINDOW_BLOCKS // 2) * block
