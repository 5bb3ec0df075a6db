"""Diarization error rate, and how far boundaries are from the truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from kimia_infer.data.pipeline.turns import Turn

STEP = 0.01  # seconds


@dataclass(frozen=True)
class Errors:
    """Seconds of ``speech`` in the truth, and of errors."""

    speech: float
    missed: float
    invented: float
    confused: float

    @property
    def rate(self) -> float:
        return (self.missed + self.invented + self.confused) / self.speech


def errors(truth: Sequence[Turn], found: Sequence[Turn]) -> Errors:
    """Without a tolerance at boundaries, overlapping speech included; speakers mapped at best.

    The definition of NIST's Rich Transcription evaluation, in steps of 10 ms.
    """
    length = max(turn.end for turn in (*truth, *found))
    true, guess = _frames(truth, length), _frames(found, length)
    rows, columns = linear_sum_assignment(true.T.astype(int) @ guess.astype(int), maximize=True)
    right = sum(
        (true[:, row] & guess[:, column]).sum() for row, column in zip(rows, columns, strict=True)
    )
    spoken, claimed = true.sum(1), guess.sum(1)
    both = np.minimum(spoken, claimed).sum()
    return Errors(
        speech=spoken.sum() * STEP,
        missed=np.maximum(spoken - claimed, 0).sum() * STEP,
        invented=np.maximum(claimed - spoken, 0).sum() * STEP,
        confused=(both - right) * STEP,
    )


def _frames(turns: Sequence[Turn], length: float) -> np.ndarray:
    speakers = 1 + max((turn.speaker for turn in turns), default=0)
    active = np.zeros((round(length / STEP) + 1, speakers), bool)
    for turn in turns:
        active[round(turn.start / STEP) : round(turn.end / STEP), turn.speaker] = True
    return active


def boundary_distances(truth: Sequence[Turn], found: Sequence[Turn]) -> np.ndarray:
    """Seconds from each start to the nearest start of the truth, and from each end to an end."""
    starts, ends = (np.array([getattr(t, name) for t in truth]) for name in ("start", "end"))
    return np.array(
        [np.abs(starts - turn.start).min() for turn in found]
        + [np.abs(ends - turn.end).min() for turn in found]
    )
