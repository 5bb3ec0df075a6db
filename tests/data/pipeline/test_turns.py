"""The report's rules for turns, on cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from kimia_infer.data.pipeline.make import widened
from kimia_infer.data.pipeline.turns import (
    Segment,
    Turn,
    merge_clusters,
    merge_turns,
    reassigned,
)
from tests.data.pipeline.scoring import boundary_distances, errors


def spans(segments: list[Segment]) -> list[tuple[float, float, int]]:
    return [(segment.start, segment.end, segment.speaker) for segment in segments]


def test_turns_of_one_speaker_join_over_two_seconds_of_silence() -> None:
    turns = [Turn(0, 3, 0), Turn(5, 6, 0), Turn(8.1, 9, 0)]
    assert spans(merge_turns(turns)) == [(0, 6, 0), (8.1, 9, 0)]


def test_segments_end_before_27_seconds_and_long_turns_stay_alone() -> None:
    turns = [Turn(0, 20, 0), Turn(20.5, 27, 0), Turn(27.5, 28, 0), Turn(28.5, 70, 0)]
    assert spans(merge_turns(turns)) == [(0, 27, 0), (27.5, 28, 0), (28.5, 70, 0)]


def test_another_speaker_between_two_turns_keeps_them_apart() -> None:
    turns = [Turn(0, 2, 0), Turn(2.1, 3, 1), Turn(3.1, 4, 0)]
    assert spans(merge_turns(turns)) == [(0, 2, 0), (2.1, 3, 1), (3.1, 4, 0)]


def test_overlap_is_the_share_in_which_others_talk() -> None:
    first, second, third = merge_turns([Turn(0, 4, 0), Turn(3, 5, 1), Turn(3.5, 4.5, 2)])
    assert (first.overlap, second.overlap, third.overlap) == (0.25, 0.75, 1.0)


def test_clusters_of_one_voice_are_merged() -> None:
    angles = np.radians([0, 10, 40, 50, 120])
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1)
    labels = np.array([4, 4, 1, 1, 3])
    # The means of the first two are 40 degrees apart (0.77), those of the others 95 and 75.
    assert merge_clusters(vectors, labels, 0.6).tolist() == [0, 0, 0, 0, 1]
    assert merge_clusters(vectors, labels, 0.8).tolist() == [0, 0, 1, 1, 2]


def test_a_turn_is_only_cut_where_neighbouring_chunks_differ() -> None:
    voices = np.eye(2)
    same = np.array([[1.0, 0.0], [0.9, 0.436]])
    assert reassigned(same, voices, 0.5) is None
    changes = np.array([[1.0, 0.0], [0.1, 0.995], [0.0, 1.0]])
    found = reassigned(changes, voices, 0.5)
    assert found is not None and found.tolist() == [0, 1, 1]
    assert reassigned(same[:1], voices, 0.5) is None


def test_segments_get_the_silence_around_them() -> None:
    segments = [Segment(1.0, 2.0, 0), Segment(2.1, 3.0, 1), Segment(2.8, 4.0, 0)]
    found = widened(segments, 4.05)
    expected = [(0.85, 2.05), (2.05, 3.15), (2.65 + 0.0, 4.05)]
    assert np.allclose(found[:2], expected[:2]) and found[2][1] == pytest.approx(4.05)


def test_error_rate_by_hand() -> None:
    truth = [Turn(0, 4, 0), Turn(3, 6, 1)]
    assert errors(truth, [Turn(0, 4, 5), Turn(3, 6, 2)]).rate == 0
    # One second each: missed at the start, invented at the end, and given to the wrong speaker.
    found = errors(truth, [Turn(1, 4, 1), Turn(3, 5, 0), Turn(5, 6, 1), Turn(6, 7, 0)])
    assert found.speech == pytest.approx(7)
    assert (found.missed, found.invented, found.confused) == pytest.approx((1, 1, 1))


def test_distances_of_boundaries() -> None:
    truth = [Turn(0, 2, 0), Turn(3, 5, 1)]
    assert boundary_distances(truth, [Turn(0.1, 4.5, 0)]).tolist() == pytest.approx([0.1, 0.5])
