"""Where to cut a long recording: at its quietest points."""

from __future__ import annotations

import itertools

import numpy as np

from kimia_infer.audio.files import SAMPLE_RATE

LONGEST_SECONDS = 30.0
"""Longest segment: the input length of both audio encoders (published configuration)."""

SEARCH_SECONDS = 5.0
"""The cut is searched in the last seconds of a segment. Speakers pause more often than that."""

LAST_SECONDS = 1.0
"""Shortest last segment, as models invent text for very short audio."""

BLOCK_SECONDS = 0.01
WINDOW_BLOCKS = 10
"""Short-time energy: over 100 ms, about a syllable, every 10 ms."""


def split_at_quiet(
    samples: np.ndarray,
    sample_rate: int = SAMPLE_RATE,
    longest: float = LONGEST_SECONDS,
    search: float = SEARCH_SECONDS,
    last: float = LAST_SECONDS,
) -> list[tuple[int, int]]:
    """Cut [samples] into segments of at most ``longest`` seconds: ``(start, end)`` in samples.

    They cover the recording in order, without gaps or overlap. Each but the last ends in the
    middle of the quietest 100 ms (the latest of equals) of its last ``search`` seconds, leaving
    at least ``last`` seconds for the next. ValueError unless ``last + 0.2 <= search <= longest``.
    """
    if not last + 2 * WINDOW_BLOCKS * BLOCK_SECONDS <= search <= longest:
        raise ValueError(f"cannot search {search} s of {longest} s, leaving {last} s")
    most, region, least = (round(seconds * sample_rate) for seconds in (longest, search, last))
    cuts = [0]
    while len(samples) - cuts[-1] > most:
        begin, end = cuts[-1] + most - region, min(cuts[-1] + most, len(samples) - least)
        cuts.append(begin + _quietest(samples[begin:end], round(BLOCK_SECONDS * sample_rate)))
    return list(itertools.pairwise([*cuts, len(samples)]))


def _quietest(samples: np.ndarray, block: int) -> int:
    """The middle of the window with the least energy."""
    blocks = samples[: len(samples) // block * block].reshape(-1, block)
    energy = np.square(blocks, dtype=np.float64).sum(axis=1)
    windows = np.lib.stride_tricks.sliding_window_view(energy, WINDOW_BLOCKS).sum(axis=1)
    latest = len(windows) - 1 - int(np.argmin(windows[::-1]))
    return (latest + WINDOW_BLOCKS // 2) * block
