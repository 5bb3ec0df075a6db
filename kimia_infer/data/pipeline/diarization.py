"""Who speaks when in a recording: segmentation in windows, a vector for every voice, clusters."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, takewhile
from pathlib import Path

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor

from kimia_infer.audio.files import SAMPLE_RATE
from kimia_infer.data.pipeline.models import SEGMENTATION_NAME, SPEAKERS_NAME
from kimia_infer.data.pipeline.segmentation import (
    FRAME_STEP,
    LOCAL_SPEAKERS,
    WINDOW_SAMPLES,
    frame_of,
    frames_in,
    load_segmentation,
    local_speakers,
    time_of,
)
from kimia_infer.data.pipeline.speaker_network import load_speaker_network, voice_vectors
from kimia_infer.data.pipeline.turns import Turn, centers, merge_clusters, reassigned

STEP_FRAMES = 148
"""From one window to the next, 2.5 s."""
BATCH = 16

HEARD_SECONDS = 0.5
"""A voice is compared where it is heard alone for so long."""
SURE_SECONDS = 1.0
"""Voices heard for less are not clustered, but given to the nearest cluster."""
ENOUGH_SECONDS = 2.5
"""No more of it is heard: the vector hardly changes, and it is most of the work."""
SAME_RUN = 0.85
"""Where windows overlap, runs that share so much of both are one, and heard once."""

SAME_VOICE = 0.5
"""Cosine between the means of two groups of vectors from which on they are clustered."""
MERGED_VOICE = 0.75
"""Clusters above it are merged; the report has 0.6 for vectors of another network."""
CHUNK_SECONDS, CHUNK_SIMILARITY = 1.5, 0.25
"""The report has 0.5 for vectors of another network. This one is a guess for CAM++: low, as a turn
of one voice should not be cut, so that a change between voices that are alike may be missed."""

SHORTEST_TURN, SHORTEST_PAUSE = 0.25, 0.2
"""Seconds; shorter turns are dropped, shorter pauses of a speaker closed."""


class Diarizer:
    """Finds the turns of speakers. ``directory`` has both networks, see ``models.py``."""

    def __init__(self, directory: Path):
        self._segmentation = load_segmentation(directory / SEGMENTATION_NAME)
        self._speakers = load_speaker_network(directory / SPEAKERS_NAME)

    def turns(self, wave: np.ndarray, speech: Sequence[tuple[float, float]]) -> list[Turn]:
        """Turns by start, of speakers numbered from 0 as they appear.

        Args:
            wave: float32 [samples] at 16 kHz.
            speech: start and end in seconds of what is speech; the rest is nobody's turn.
        """
        sound = torch.from_numpy(np.ascontiguousarray(wave, dtype=np.float32))
        spoken = _spoken_frames(speech, frames_in(len(wave)))
        starts, activity = self._local(sound, spoken)
        runs = heard_alone(starts, activity)
        if not runs:
            return []
        vectors = self._vectors(sound, [run for run, _ in runs])
        sure = np.array([run.seconds >= SURE_SECONDS for run, _ in runs])
        labels = cluster(vectors, sure)
        speakers: dict[tuple[int, int], list[tuple[Turn, int]]] = {}
        for (run, places), label in zip(runs, labels.tolist(), strict=True):
            for place in places:
                speakers.setdefault(place, []).append((run, label))
        found = _joined(starts, activity, speakers, len(spoken))
        turns = _turns(found)
        if found.shape[1] > 1:
            turns = self._reassign(sound, turns, centers(vectors, labels))
        return renumbered(turns)

    def _local(self, sound: Tensor, spoken: np.ndarray) -> tuple[list[int], list[np.ndarray]]:
        """Where windows with speech begin, in frames, and who speaks, bool [frames, 3] each."""
        starts = [
            start
            for start in range(0, max(1, len(spoken) - STEP_FRAMES), STEP_FRAMES)
            if spoken[start : start + WINDOW_SAMPLES // FRAME_STEP].any()
        ]
        found: list[np.ndarray] = []
        for begin in range(0, len(starts), BATCH):
            windows = torch.zeros(len(starts[begin : begin + BATCH]), WINDOW_SAMPLES)
            for row, start in zip(windows, starts[begin : begin + BATCH], strict=True):
                part = sound[start * FRAME_STEP :][:WINDOW_SAMPLES]
                row[: len(part)] = part
            found.extend(local_speakers(self._segmentation, windows))
        clipped = []
        for start, active in zip(starts, found, strict=True):
            within = spoken[start : start + len(active)]
            clipped.append(active[: len(within)] & within[:, None])
        return starts, clipped

    def _vectors(self, sound: Tensor, runs: Sequence[Turn]) -> np.ndarray:
        """Of the voices in ``runs``, float32 [runs, size] of length 1."""
        most = round(ENOUGH_SECONDS * SAMPLE_RATE)
        waves = [
            sound[round(run.start * SAMPLE_RATE) : round(run.end * SAMPLE_RATE)] for run in runs
        ]
        return voice_vectors(self._speakers, [wave[:most] for wave in waves]).numpy()

    def _reassign(self, sound: Tensor, turns: list[Turn], voices: np.ndarray) -> list[Turn]:
        """Turns with several voices cut into chunks of the voice that each resembles most."""
        cuts = [_chunks(turn) for turn in turns]
        chunks = [chunk for cut in cuts if len(cut) > 2 for chunk in pairwise(cut)]
        waves = [sound[round(a * SAMPLE_RATE) : round(b * SAMPLE_RATE)] for a, b in chunks]
        vectors = iter(voice_vectors(self._speakers, waves).numpy())
        found = []
        for turn, cut in zip(turns, cuts, strict=True):
            speakers = None
            if len(cut) > 2:
                own = np.stack([next(vectors) for _ in range(len(cut) - 1)])
                speakers = reassigned(own, voices, CHUNK_SIMILARITY)
            if speakers is None:
                found.append(turn)
                continue
            for (start, end), speaker in zip(pairwise(cut), speakers.tolist(), strict=True):
                if found and found[-1].speaker == speaker and found[-1].end == start:
                    start = found.pop().start
                found.append(Turn(start, end, speaker))
        return found


def cluster(vectors: np.ndarray, sure: np.ndarray) -> np.ndarray:
    """Speakers of vectors float32 [items, size] of length 1, int [items].

    Those that are ``sure``, bool [items], are clustered by mean similarity; if none is, all are.
    The others get the nearest of those speakers.
    """
    chosen = np.flatnonzero(sure) if sure.any() else np.arange(len(vectors))
    few = len(chosen) < 2
    tree = None if few else linkage(vectors[chosen].astype(float), "average", "cosine")
    found = np.zeros(len(chosen), int) if few else fcluster(tree, 1 - SAME_VOICE, "distance") - 1
    found = merge_clusters(vectors[chosen], found, MERGED_VOICE)
    labels = (vectors @ centers(vectors[chosen], found).T).argmax(1)
    labels[chosen] = found
    return labels


def _spoken_frames(speech: Sequence[tuple[float, float]], count: int) -> np.ndarray:
    """bool [count]: which frames are speech."""
    spoken = np.zeros(count, bool)
    for start, end in speech:
        spoken[frame_of(start) : frame_of(end) + 1] = True
    return spoken


def heard_alone(
    starts: Sequence[int], activity: Sequence[np.ndarray]
) -> list[tuple[Turn, list[tuple[int, int]]]]:
    """Where one person alone is heard without a pause, and in which windows, as which speaker.

    Windows begin at frames ``starts`` and say who speaks, bool [frames, 3] each.
    """
    found: list[tuple[Turn, list[tuple[int, int]]]] = []
    for window, (start, active) in enumerate(zip(starts, activity, strict=True)):
        alone = active & (active.sum(1, keepdims=True) == 1)
        for local in range(LOCAL_SPEAKERS):
            for begin, end in _runs(alone[:, local]):
                run = Turn(time_of(start + begin - 0.5), time_of(start + end - 0.5), local)
                if run.seconds < HEARD_SECONDS:
                    continue
                known = _known(found, run, time_of(start))
                if known is None:
                    found.append((run, [(window, local)]))
                else:
                    known[1].append((window, local))
    return found


def _known(
    found: Sequence[tuple[Turn, list[tuple[int, int]]]], run: Turn, begin: float
) -> tuple[Turn, list[tuple[int, int]]] | None:
    """The one of ``found`` that is ``run``; what ended before ``begin`` is not."""
    for one in takewhile(lambda one: one[0].end > begin, reversed(found)):
        shared = min(one[0].end, run.end) - max(one[0].start, run.start)
        if shared >= SAME_RUN * max(one[0].seconds, run.seconds):
            return one
    return None


def _runs(active: np.ndarray) -> list[list[int]]:
    """First frame and end of the runs of True in bool [frames]."""
    edges = np.flatnonzero(np.diff(active.astype(np.int8), prepend=0, append=0))
    return edges.reshape(-1, 2).tolist()


def _joined(
    starts: Sequence[int],
    activity: Sequence[np.ndarray],
    speakers: dict[tuple[int, int], list[tuple[Turn, int]]],
    count: int,
) -> np.ndarray:
    """Who speaks by the majority of the windows that cover a frame, bool [count, speakers].

    Whoever speaks in a window is the speaker of the nearest run, of those that ``speakers`` has by
    window and local speaker. Voices that were never heard alone are left out.
    """
    names = 1 + max(label for runs in speakers.values() for _, label in runs)
    votes, windows = np.zeros((count, names)), np.zeros((count, 1))
    for window, (start, active) in enumerate(zip(starts, activity, strict=True)):
        mine = np.zeros((len(active), names), bool)
        for local in range(LOCAL_SPEAKERS):
            runs = speakers.get((window, local))
            if runs is None:
                continue
            frames = np.flatnonzero(active[:, local])
            times = (start + frames)[:, None] * FRAME_STEP / SAMPLE_RATE
            begins, ends = (
                np.array([getattr(r, name) for r, _ in runs]) for name in ("start", "end")
            )
            nearest = np.maximum(begins - times, times - ends).argmin(1)
            mine[frames, np.array([label for _, label in runs])[nearest]] = True
        votes[start : start + len(active)] += mine
        windows[start : start + len(active)] += 1
    return votes * 2 > np.maximum(windows, 1)


def _turns(active: np.ndarray) -> list[Turn]:
    """Runs of bool [frames, speakers], pauses closed and short ones dropped, by start."""
    found = []
    for speaker in range(active.shape[1]):
        runs: list[list[float]] = []
        for start, end in _runs(active[:, speaker]):
            begin = time_of(start - 0.5)
            if runs and begin - runs[-1][1] < SHORTEST_PAUSE:
                runs[-1][1] = time_of(end - 0.5)
            else:
                runs.append([begin, time_of(end - 0.5)])
        found += [Turn(max(0.0, a), b, speaker) for a, b in runs if b - a >= SHORTEST_TURN]
    return sorted(found, key=lambda turn: (turn.start, turn.end))


def _chunks(turn: Turn) -> list[float]:
    """Where chunks of about CHUNK_SECONDS begin, and the end of the last."""
    count = max(1, round(turn.seconds / CHUNK_SECONDS))
    return np.linspace(turn.start, turn.end, count + 1).tolist()


def renumbered(turns: Sequence[Turn]) -> list[Turn]:
    """The same, sorted by start, of speakers numbered from 0 as they appear."""
    ordered = sorted(turns, key=lambda turn: (turn.start, turn.end))
    names: dict[int, int] = {}
    return [
        Turn(turn.start, turn.end, names.setdefault(turn.speaker, len(names))) for turn in ordered
    ]
