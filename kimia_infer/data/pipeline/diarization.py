"""Who speaks when in a recording: segmentation in windows, a vector for every voice, clusters."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor

from kimia_infer.audio.files import SAMPLE_RATE
from kimia_infer.data.pipeline.segmentation import (
    FRAME_LENGTH,
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

HEARD_SECONDS = 0.6
"""A voice is compared where it was heard alone for so long in a window."""
ENOUGH_SECONDS = 2.5
"""No more of it is heard: the vector hardly changes, and it is most of the work."""
SURE_SECONDS = 1.5
"""Voices heard for less are not clustered, but given to the nearest cluster."""

SAME_VOICE = 0.5
"""Cosine between the means of two groups of vectors from which on they are clustered."""
MERGED_VOICE = 0.6
"""The report's: clusters above it are merged."""
CHUNK_SECONDS, CHUNK_SIMILARITY = 1.5, 0.25
"""The report has 0.5 for vectors of another network; of CAM++, neighbouring chunks of one voice are
rarely below 0.25, of two rarely above."""

SHORTEST_TURN, SHORTEST_PAUSE = 0.25, 0.2
"""Seconds; shorter turns are dropped, shorter pauses of a speaker closed."""


class Diarizer:
    """Finds the turns of speakers. ``directory`` has both networks, see ``models.py``."""

    def __init__(self, directory: Path):
        self._segmentation = load_segmentation(directory / "segmentation.safetensors")
        self._speakers = load_speaker_network(directory / "speakers.safetensors")

    def turns(self, wave: np.ndarray, speech: Sequence[tuple[float, float]]) -> list[Turn]:
        """Turns by start, of speakers numbered from 0 as they appear.

        Args:
            wave: float32 [samples] at 16 kHz.
            speech: start and end in seconds of what is speech; the rest is nobody's turn.
        """
        sound = torch.from_numpy(np.ascontiguousarray(wave, dtype=np.float32))
        spoken = _spoken_frames(speech, frames_in(len(wave)))
        starts, activity = self._local(sound, spoken)
        voices = self._voices(sound, starts, activity)
        if not voices:
            return []
        places = list(voices)
        vectors = np.stack([vector for vector, _ in voices.values()])
        sure = np.array([seconds >= SURE_SECONDS for _, seconds in voices.values()])
        labels = cluster(vectors, sure)
        found = _joined(starts, activity, dict(zip(places, labels.tolist(), strict=True)), spoken)
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

    def _voices(
        self, sound: Tensor, starts: Sequence[int], activity: Sequence[np.ndarray]
    ) -> dict[tuple[int, int], tuple[np.ndarray, float]]:
        """Vector and seconds heard alone, by window and local speaker."""
        places, waves = [], []
        for window, (start, active) in enumerate(zip(starts, activity, strict=True)):
            alone = active & (active.sum(1, keepdims=True) == 1)
            for speaker in range(LOCAL_SPEAKERS):
                frames = np.flatnonzero(alone[:, speaker])
                if len(frames) * FRAME_STEP < HEARD_SECONDS * SAMPLE_RATE:
                    continue
                frames = frames[: round(ENOUGH_SECONDS * SAMPLE_RATE / FRAME_STEP)]
                # A frame's own samples are those around its middle.
                first = (start + frames) * FRAME_STEP + (FRAME_LENGTH - FRAME_STEP) // 2
                samples = (first[:, None] + np.arange(FRAME_STEP)).reshape(-1)
                places.append((window, speaker))
                waves.append(sound[torch.from_numpy(samples[samples < len(sound)])])
        vectors = voice_vectors(self._speakers, waves).numpy()
        seconds = [len(wave) / SAMPLE_RATE for wave in waves]
        return dict(zip(places, zip(vectors, seconds, strict=True), strict=True))

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


def _joined(
    starts: Sequence[int],
    activity: Sequence[np.ndarray],
    speakers: dict[tuple[int, int], int],
    spoken: np.ndarray,
) -> np.ndarray:
    """Who speaks by the majority of the windows that cover a frame, bool [frames, speakers].

    Voices that were never heard alone are left out.
    """
    votes = np.zeros((len(spoken), max(speakers.values()) + 1))
    windows = np.zeros((len(spoken), 1))
    for window, (start, active) in enumerate(zip(starts, activity, strict=True)):
        mine = np.zeros((len(active), votes.shape[1]), bool)
        for local in range(LOCAL_SPEAKERS):
            speaker = speakers.get((window, local))
            if speaker is not None:
                mine[:, speaker] |= active[:, local]
        votes[start : start + len(active)] += mine
        windows[start : start + len(active)] += 1
    return votes * 2 > np.maximum(windows, 1)


def _turns(active: np.ndarray) -> list[Turn]:
    """Runs of bool [frames, speakers], pauses closed and short ones dropped, by start."""
    found = []
    for speaker in range(active.shape[1]):
        edges = np.flatnonzero(np.diff(active[:, speaker].astype(np.int8), prepend=0, append=0))
        runs: list[list[float]] = []
        for start, end in edges.reshape(-1, 2).tolist():
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
