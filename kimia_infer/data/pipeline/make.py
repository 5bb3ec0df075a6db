"""Recordings to training data, with a journal of every segment, so that the work can go on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kimia_infer.audio.files import SAMPLE_RATE, AudioError, load_audio, write_wav
from kimia_infer.data.conversations import UNDERSTANDING, DataError
from kimia_infer.data.manifests import QUESTION
from kimia_infer.data.pipeline.filters import Limits, Measured, sound_fault, text_fault
from kimia_infer.data.pipeline.quality import Quality
from kimia_infer.data.pipeline.recognition import Difference, Recognizer
from kimia_infer.data.pipeline.turns import Segment, Turn, merge_turns
from kimia_infer.utils.files import Journal, write_json_lines
from kimia_infer.utils.progress import progress

DOCUMENT = "document"
"""The task type of lines with the segments of a recording one after another, for pre-training."""

MARGIN_SECONDS = 0.15
"""Of the silence around a segment, so much is kept at most: the ends of words are quiet."""

JOURNAL_NAME, CONVERSATIONS_NAME = "journal.jsonl", "conversations.jsonl"
DOCUMENTS_NAME, SEGMENTS_NAME = "documents.jsonl", "segments.jsonl"
AUDIO_FOLDER = "audio"

Row = dict[str, Any]


class Detector(Protocol):
    def speech(self, wave: np.ndarray) -> list[tuple[float, float]]: ...


class TurnFinder(Protocol):
    def turns(self, wave: np.ndarray, speech: Sequence[tuple[float, float]]) -> list[Turn]: ...


class Meter(Protocol):
    def measure(self, wave: np.ndarray) -> Quality: ...


@dataclass(frozen=True)
class Tools:
    """What analyses recordings. ``difference`` is needed with a ``second`` recognizer."""

    detector: Detector
    turns: TurnFinder
    meter: Meter
    first: Recognizer
    second: Recognizer | None = None
    difference: Difference | None = None

    def measured(self, segment: Segment, quality: Quality, wave: np.ndarray) -> Measured:
        """A segment with what the recognizers hear in it."""
        heard = self.first.hear(wave)
        if self.second is None or self.difference is None:
            return Measured(segment, quality, heard)
        second = self.second.hear(wave)
        language = heard.language or second.language
        difference = self.difference(heard.text, second.text, language)
        return Measured(segment, quality, heard, second, difference)


@dataclass(frozen=True)
class Made:
    """What a run has made: recordings that could be read, rows of all their segments, and faults.

    A row has the segment's place, measures, texts, ``fault`` (None if it is kept) and the
    ``audio`` that was cut from the recording, a path relative to the output.
    """

    recordings: list[Row]
    segments: list[Row]
    unreadable: list[Row]

    @property
    def kept(self) -> list[Row]:
        return [row for row in self.segments if row["fault"] is None]

    def faults(self) -> dict[str, tuple[int, float]]:
        """Segments and seconds dropped for each fault, most seconds first."""
        found: dict[str, tuple[int, float]] = {}
        for row in self.segments:
            if row["fault"] is not None:
                count, seconds = found.get(row["fault"], (0, 0.0))
                found[row["fault"]] = count + 1, seconds + row["end"] - row["start"]
        return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def make_data(
    paths: Sequence[Path], output: Path, tools: Tools, limits: Limits, question: str = QUESTION
) -> Made:
    """Write the training data of recordings into the directory ``output``.

    ``conversations.jsonl`` asks ``question`` about every segment that is kept, answered by its
    text; ``documents.jsonl`` has segments that follow each other, for pre-training;
    ``segments.jsonl`` all segments with their measures; ``audio/`` their sound. Each recording is
    held in memory, 230 MB an hour. Paths of audio are relative to ``output``.

    After an interruption the same call continues; recordings may be added to ``paths``. Those of
    ``paths`` that an earlier call has cut, as a directory around ``output`` has them, are left out.

    Raises:
        DataError: the directory was begun with other limits or recognizers or is in use, a
            recording that is not finished has changed since, or none could be read.
    """
    names = [one.name for one in (tools.first, tools.second) if one is not None]
    header = {"limits": limits.model_dump(mode="json"), "recognizers": names}
    journal, cut = Journal(output / JOURNAL_NAME), (output / AUDIO_FOLDER).resolve()
    whole = [p for p in (path.resolve() for path in paths) if not p.is_relative_to(cut)]
    if not whole:
        raise DataError(f"{cut}: segments of an earlier run are no recordings")
    try:
        with journal:
            run = _Run(journal, output, tools, limits, header)
            for path in progress("Recordings", unit="recordings", iterable=whole):
                run.analyse(path)
            made = run.made(whole)
    except BlockingIOError as error:
        raise DataError(f"{journal.path}: another process is writing it") from error
    if not made.recordings:
        raise DataError(f"no recording can be used; the first: {made.unreadable[0]['error']}")
    write_json_lines(output / SEGMENTS_NAME, made.segments)
    write_json_lines(output / CONVERSATIONS_NAME, (_conversation(r, question) for r in made.kept))
    write_json_lines(output / DOCUMENTS_NAME, _documents(made.segments))
    return made


class _Run:
    """The journal's content, and what adds to it."""

    def __init__(
        self, journal: Journal, output: Path, tools: Tools, limits: Limits, header: Row
    ) -> None:
        self._journal, self._output = journal, output
        self._tools, self._limits = tools, limits
        self._recordings: dict[str, Row] = {}
        self._segments: dict[str, dict[int, Row]] = {}
        rows = [json.loads(line) for _, line in journal.lines()]
        if not rows:
            journal.add(header)
        elif rows[0] != header:
            raise DataError(
                f"{journal.path}: was begun with other limits or recognizers; name another output"
            )
        for row in rows[1:]:
            self._remember(row)

    def _remember(self, row: Row) -> None:
        name = row["recording"]
        if "number" in row:
            self._segments.setdefault(name, {})[row["number"]] = row
        else:
            self._recordings[name] = row

    def _add(self, row: Row) -> None:
        self._journal.add(row)
        self._remember(row)

    def analyse(self, path: Path) -> None:
        """Journal what is missing of a recording. Raises DataError if it has changed."""
        name = str(path)
        known = self._recordings.get(name)
        if known is not None and "error" in known:  # read again: it may have been repaired
            known = None
        done = self._segments.get(name, {})
        if known is not None and len(done) == len(known["segments"]):
            return
        try:
            wave = load_audio(path, max_seconds=None)
        except AudioError as error:
            if known is not None:
                raise DataError(f"{path}: has changed since the work began: {error}") from error
            row = {"recording": name, "error": str(error)}
            if self._recordings.get(name) != row:
                self._add(row)
            return
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if known is None:
            known = self._found(name, digest, wave)
            self._add(known)
        elif known["sha256"] != digest:
            raise DataError(f"{path}: has changed since the work began; name another output")
        segments = [Segment(**values) for values in known["segments"]]
        left = [number for number in range(len(segments)) if number not in done]
        self._hear(known, segments, left, wave)

    def _found(self, name: str, digest: str, wave: np.ndarray) -> Row:
        """The row of a recording: who speaks when."""
        speech = self._tools.detector.speech(wave)
        turns = self._tools.turns.turns(wave, speech)
        return {
            "recording": name,
            "sha256": digest,
            "seconds": len(wave) / SAMPLE_RATE,
            "speech_seconds": sum(end - start for start, end in speech),
            "speakers": len({turn.speaker for turn in turns}),
            "segments": [asdict(segment) for segment in merge_turns(turns)],
        }

    def _hear(
        self, known: Row, segments: list[Segment], left: Sequence[int], wave: np.ndarray
    ) -> None:
        """Measure and transcribe the segments that are ``left``."""
        seconds = len(wave) / SAMPLE_RATE
        wide = widened(segments, seconds)
        pool = ThreadPoolExecutor(self._tools.first.together)
        try:
            jobs = [
                pool.submit(
                    self._measure, known, number, segments[number], _cut(wave, wide[number])
                )
                for number in left
            ]
            bar = progress(Path(known["recording"]).name, len(segments), "segments")
            with bar:
                bar.update(len(segments) - len(left))
                for job in as_completed(jobs):
                    self._add(job.result())
                    bar.update()
        finally:
            pool.shutdown(cancel_futures=True)

    def _measure(self, known: Row, number: int, segment: Segment, wave: np.ndarray) -> Row:
        """The row of a segment, whose sound is written, too."""
        quality = self._tools.meter.measure(wave)
        fault = sound_fault(segment, quality, self._limits)
        measured = None
        if fault is None:
            measured = self._tools.measured(segment, quality, wave)
            fault = text_fault(measured, self._limits)
        stem = f"{Path(known['recording']).stem}-{known['sha256'][:8]}"
        audio = Path(AUDIO_FOLDER, stem, f"{number:05d}.wav")
        write_wav(self._output / audio, wave, SAMPLE_RATE)
        row = {"recording": known["recording"], "sha256": known["sha256"], "number": number}
        row |= asdict(segment) | asdict(quality) | {"audio": str(audio), "fault": fault}
        if measured is None:
            return row
        row |= {"text": measured.heard.text, "language": measured.language}
        row |= {"confidence": measured.heard.confidence, "difference": measured.difference}
        if measured.second is not None:
            row |= {"second_text": measured.second.text}
            row |= {"second_confidence": measured.second.confidence}
        return row

    def made(self, paths: Sequence[Path]) -> Made:
        known = [self._recordings[str(path)] for path in dict.fromkeys(paths)]
        good = [row for row in known if "error" not in row]
        segments = [
            rows[number]
            for row in good
            for rows in [self._segments.get(row["recording"], {})]
            for number in sorted(rows)
        ]
        return Made(good, segments, [row for row in known if "error" in row])


def widened(segments: Sequence[Segment], seconds: float) -> list[tuple[float, float]]:
    """Start and end of segments with up to MARGIN_SECONDS of silence around them.

    Of a shorter silence between two, each gets half.
    """
    found = []
    for segment in segments:
        before = [other.end for other in segments if other.end <= segment.start]
        after = [other.start for other in segments if other.start >= segment.end]
        room = (segment.start - max(before)) / 2 if before else segment.start
        start = segment.start - min(MARGIN_SECONDS, room)
        room = (min(after) - segment.end) / 2 if after else seconds - segment.end
        found.append((max(0.0, start), min(seconds, segment.end + min(MARGIN_SECONDS, room))))
    return found


def _cut(wave: np.ndarray, span: tuple[float, float]) -> np.ndarray:
    start, end = (round(seconds * SAMPLE_RATE) for seconds in span)
    return wave[start:end]


SOURCE_FIELDS = ("recording", "sha256", "start", "end", "speaker", "language", "score")


def _source(row: Row) -> Row:
    """Where a segment is from."""
    return {name: row[name] for name in SOURCE_FIELDS}


def _conversation(row: Row, question: str) -> Row:
    messages = [
        {"role": "user", "message_type": "text", "content": question},
        {"role": "user", "message_type": "audio", "content": row["audio"]},
        {"role": "assistant", "message_type": "text", "content": row["text"]},
    ]
    return {"task_type": UNDERSTANDING, "conversation": messages, "source": _source(row)}


def _documents(rows: Sequence[Row]) -> Iterator[Row]:
    """Lines with the kept segments of a recording that follow each other, at least one each."""
    for _, recording in groupby(rows, key=lambda row: row["recording"]):
        for kept, run in groupby(recording, key=lambda row: row["fault"] is None):
            if not kept:
                continue
            parts = list(run)
            messages = [
                {
                    "role": "user",
                    "message_type": "audio-text",
                    "content": [row["audio"], row["text"]],
                }
                for row in parts
            ]
            sources = [_source(row) for row in parts]
            yield {"task_type": DOCUMENT, "conversation": messages, "sources": sources}
