"""Silence in a recording is one gap, however long; the segments around it are the usual ones."""

from __future__ import annotations

import itertools
import tracemalloc
import wave as riff
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimia_infer.api.events import Completion, Event, TextDelta
from kimia_infer.api.request import Stopwatch
from kimia_infer.api.transcription import KEPT, Transcript, TranscriptSegment, transcribe_stream
from kimia_infer.audio.files import SAMPLE_RATE, AudioStream, is_silent, loudest_dbfs
from kimia_infer.audio.split import split_at_quiet
from tests.api.sounds import noise

SPEECH = noise(60)
DITHER = (np.random.default_rng(0).uniform(-1, 1, 60 * SAMPLE_RATE) / 32_768).astype(np.float32)
METRICS = dict.fromkeys(KEPT, "none") | {"stop_reason": "end"}


@dataclass
class Word:
    """One word for any sound: its loudest sample."""

    segment: np.ndarray
    on_step: Callable[[], None] = lambda: None

    def all_events(self) -> Iterator[Event]:
        assert not is_silent(loudest_dbfs(self.segment, SAMPLE_RATE))
        self.on_step()
        word = f"{np.abs(self.segment).max():.6f}"
        yield TextDelta(word)
        yield Completion(None, 0, word, [], [], [], METRICS)

    def close(self) -> None:
        pass


@dataclass
class Sound:
    blocks: Iterable[np.ndarray]
    seconds: float

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self.blocks)


def transcribe(blocks: Iterable[np.ndarray], seconds: float, longest: float) -> Transcript:
    sound = Sound(blocks, seconds)
    events = list(transcribe_stream(sound, Word, Stopwatch(), longest=longest, together=3))
    *_, transcript = events
    assert isinstance(transcript, Transcript)
    rows = [event for event in events if isinstance(event, TranscriptSegment)]
    assert rows == transcript.segments
    assert transcript.metrics["segments"] == len(rows)
    assert all(first.end == second.start for first, second in itertools.pairwise(rows))
    assert not any(first.silent and second.silent for first, second in itertools.pairwise(rows))
    assert all(row.end - row.start >= 1 for row in rows[:-1])
    return transcript


PARTS = st.lists(st.tuples(st.booleans(), st.floats(0.1, 50)), min_size=1, max_size=5)


@given(PARTS, st.sampled_from([2.0, 3.0, 30.0]))
def test_gaps_do_not_change_what_is_spoken(parts: list[tuple[bool, float]], longest: float) -> None:
    wave = np.concatenate(
        [(SPEECH if loud else DITHER)[: round(t * SAMPLE_RATE)] for loud, t in parts]
    )
    transcript = transcribe(np.array_split(wave, 7), len(wave) / SAMPLE_RATE, longest)
    spoken = [row for row in transcript.segments if not row.silent]
    pieces = split_at_quiet([wave], longest=longest, search=min(5, longest))
    expected = [
        TranscriptSegment(start / SAMPLE_RATE, (start + len(samples)) / SAMPLE_RATE, event.text)
        for start, samples in pieces
        if not is_silent(loudest_dbfs(samples, SAMPLE_RATE))
        for event in Word(samples).all_events()
        if isinstance(event, TextDelta)
    ]
    assert [replace(row, speech=None) for row in spoken] == expected
    assert all(
        row.speech is not None and row.start <= row.speech[0] < row.speech[1] <= row.end
        for row in spoken
    )
    seconds = sum(row.end - row.start for row in transcript.segments)
    assert seconds == pytest.approx(len(wave) / SAMPLE_RATE)


@pytest.mark.parametrize("longest", [3.0, 30.0])
def test_hours_of_near_silence_are_a_handful_of_rows(longest: float, long: bool) -> None:
    """Hiss that nobody hears, with two words in it."""
    seconds = 7200 if long else 600
    second = DITHER[:SAMPLE_RATE]
    words = {seconds // 3, seconds // 2}
    blocks = (second + SPEECH[:SAMPLE_RATE] * (i in words) for i in range(seconds))
    rows = transcribe(blocks, seconds, longest).segments
    assert sum(row.silent for row in rows) == 3
    assert len(rows) <= 7


def test_memory_does_not_grow_with_the_recording(tmp_path: Path, long: bool) -> None:
    """Silence is decoded, measured and forgotten; the file is read twice, for its length first."""
    seconds = 7200 if long else 1800
    path = tmp_path / "long.wav"
    with riff.open(str(path), "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
        for _ in range(seconds // 100):
            file.writeframesraw(bytes(2 * 100 * SAMPLE_RATE))
    tracemalloc.start()
    try:
        stream = AudioStream(path)
        transcript = transcribe(stream, stream.seconds, 30.0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [row.end for row in transcript.segments] == [seconds]
    assert peak < 50e6
