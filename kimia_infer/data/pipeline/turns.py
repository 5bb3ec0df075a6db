"""Speakers' turns in a recording, and the report's rules that make segments of them.

The report is that of Kimi-Audio (https://arxiv.org/abs/2504.18425, section 3.1): clusters of one
voice are merged, chunks are given to the voice they resemble most, and neighbouring turns of one
speaker become segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

LONGEST_SECONDS = 27.0
"""No turn is added to a segment that would become longer (the report)."""
LONGEST_PAUSE = 2.0
"""Seconds of silence within a segment at most (the report)."""


@dataclass(frozen=True)
class Turn:
    """``speaker`` talks from ``start`` to ``end``, in seconds."""

    start: float
    end: float
    speaker: int

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class Segment(Turn):
    """Turns of one speaker. ``overlap`` is the share of it in which somebody else talks, too."""

    overlap: float = 0.0


def merge_turns(turns: Sequence[Turn]) -> list[Segment]:
    """Segments of at most LONGEST_SECONDS, where no turn alone is longer, in order.

    A turn joins the segment before it if that is of the same speaker, nobody else's turn lies
    between them, the pause is at most LONGEST_PAUSE, and both together are not too long.
    """
    found: list[Segment] = []
    for turn in sorted(turns, key=lambda turn: (turn.start, turn.end)):
        last = found[-1] if found else None
        joins = (
            last is not None
            and turn.speaker == last.speaker
            and turn.start - last.end <= LONGEST_PAUSE
            and max(turn.end, last.end) - last.start <= LONGEST_SECONDS
        )
        if joins:
            found[-1] = replace(found[-1], end=max(turn.end, found[-1].end))
        else:
            found.append(Segment(turn.start, turn.end, turn.speaker))
    return [replace(segment, overlap=_overlap(segment, turns)) for segment in found]


def _overlap(segment: Turn, turns: Sequence[Turn]) -> float:
    """The share of ``segment`` in which others talk."""
    others = sorted(
        (max(turn.start, segment.start), min(turn.end, segment.end))
        for turn in turns
        if turn.speaker != segment.speaker and turn.start < segment.end and turn.end > segment.start
    )
    covered, until = 0.0, segment.start
    for start, end in others:
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered / segment.seconds


def merge_clusters(vectors: np.ndarray, labels: np.ndarray, similarity: float) -> np.ndarray:
    """Labels in which clusters of one voice are one, the most alike first.

    Args:
        vectors: float32 [items, size], of length 1.
        labels: int [items], from 0 on.
        similarity: the cosine above which the means of two clusters are one voice.

    Returns labels numbered from 0 in order of appearance.
    """
    labels = labels.copy()
    while True:
        names = np.unique(labels)
        if len(names) < 2:
            break
        means = centers(vectors, labels)
        alike = means @ means.T
        np.fill_diagonal(alike, -1.0)
        first, second = np.unravel_index(int(alike.argmax()), alike.shape)
        if alike[first, second] <= similarity:
            break
        labels[labels == names[second]] = names[first]
    order = {name: place for place, name in enumerate(dict.fromkeys(labels.tolist()))}
    return np.array([order[label] for label in labels.tolist()], dtype=int)


def centers(vectors: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The mean of every cluster, in order of the labels, float32 [clusters, size] of length 1."""
    means = np.stack([vectors[labels == name].mean(0) for name in np.unique(labels)])
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def reassigned(chunks: np.ndarray, voices: np.ndarray, similarity: float) -> np.ndarray | None:
    """The voices of the chunks of a turn, int [chunks]; None where the turn is one voice.

    Args:
        chunks: vectors of the turn's chunks, in order, float32 [chunks, size], of length 1.
        voices: those of the recording's speakers, float32 [speakers, size], of length 1.
        similarity: two neighbours whose cosine is below it are different voices.
    """
    neighbours = (chunks[1:] * chunks[:-1]).sum(1)
    if not len(neighbours) or neighbours.min() >= similarity:
        return None
    return (chunks @ voices.T).argmax(1)
