"""Where to cut a long recording, at its quietest points, and where in a piece there is sound."""

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

SPEECH_DB = 40.0
"""How far below the loudest 100 ms the quiet ends of speech may be. Noise that is louder than that
counts as speech."""

MARGIN_SECONDS = 0.1
"""Of what counts as quiet, so much before and after speech is still part of it."""


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
    windows = _energies(samples, block)
    if not len(windows):
        return len(samples) // 2
    latest = len(windows) - 1 - int(np.argmin(windows[::-1]))
    return (latest + WINDOW_BLOCKS // 2) * block


def speech_within(samples: np.ndarray, sample_rate: int = SAMPLE_RATE) -> tuple[int, int]:
    """Where in ``samples`` [samples] the first sound begins and the last one ends, in samples.

    Quiet is what is 40 dB below the loudest 100 ms. What is shorter than that is all sound.
    """
    block = round(BLOCK_SECONDS * sample_rate)
    windows = _energies(samples, block)
    if not len(windows):
        return 0, len(samples)
    loud = np.flatnonzero(windows >= windows.max() * 10 ** (-SPEECH_DB / 10))
    # A window that is loud has its sound near its end if it is the first, near its beginning if
    # it is the last one.
    margin = round(MARGIN_SECONDS * sample_rate)
    begin = (int(loud[0]) + WINDOW_BLOCKS - 1) * block - margin
    return max(0, begin), min(len(samples), (int(loud[-1]) + 1) * block + margin)


def _energies(samples: np.ndarray, block: int) -> np.ndarray:
    """Of every window of ten blocks, float64 [windows]; none if there are too few samples."""
    blocks = samples[: len(samples) // block * block].reshape(-1, block)
    if len(blocks) < WINDOW_BLOCKS:
        return np.empty(0)
    energy = np.square(blocks, dtype=np.float64).sum(axis=1)
    return np.lib.stride_tricks.sliding_window_view(energy, WINDOW_BLOCKS).sum(axis=1)
