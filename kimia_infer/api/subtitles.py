"""Transcripts as subtitles, SubRip (srt) and WebVTT (vtt), and as JSON."""

from __future__ import annotations

import html
import itertools
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from kimia_infer.api.transcription import UNSPACED, Transcript, TranscriptSegment

SUBTITLE_SECONDS = 10.0
"""Longest segment of a transcript for subtitles, as words within a segment have no times."""

COLUMNS = 42
"""Longest line, as broadcasters have it. Chinese and Japanese characters take two columns."""

LINES = 2
"""Most lines that are shown together."""

WORDS = re.compile(rf"\s*(?:[{UNSPACED}]|[^\s{UNSPACED}]+)[，。、；：？！）」』》”’]*")
"""What a line can end after: words, and each Chinese or Japanese character."""


@dataclass(frozen=True)
class Cue:
    """Lines that are shown together, from ``start`` to ``end`` seconds."""

    start: float
    end: float
    lines: tuple[str, ...]


def cues(segments: Iterable[TranscriptSegment]) -> Iterator[Cue]:
    """What is shown when. Where the text of a segment takes several cues, each gets a share of its
    time by the length of its text, which is an estimate."""
    for segment in segments:
        lines = _lines(" ".join(segment.text.split()))
        pages = [tuple(lines[i : i + LINES]) for i in range(0, len(lines), LINES)]
        widths = [sum(map(_width, page)) for page in pages]
        begin, last = segment.shown
        seconds = (last - begin) / max(sum(widths), 1)
        ends = [begin + seconds * place for place in itertools.accumulate(widths)]
        for page, start, end in zip(pages, [begin, *ends], ends, strict=False):
            yield Cue(start, end, page)


def srt(segments: Iterable[TranscriptSegment]) -> str:
    """The content of a SubRip file."""
    return "\n".join(
        f"{number}\n{_span(cue, ',')}\n{_joined(cue.lines)}"
        for number, cue in enumerate(cues(segments), 1)
    )


def vtt(segments: Iterable[TranscriptSegment]) -> str:
    """The content of a WebVTT file."""
    blocks = (
        f"{_span(cue, '.')}\n{html.escape(_joined(cue.lines), quote=False)}"
        for cue in cues(segments)
    )
    return "\n".join(["WEBVTT\n", *blocks])


def _joined(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _span(cue: Cue, mark: str) -> str:
    return f"{_time(cue.start, mark)} --> {_time(cue.end, mark)}"


def _time(seconds: float, mark: str) -> str:
    """``00:01:02,345`` with ``mark`` before the milliseconds."""
    whole, milliseconds = divmod(round(1000 * seconds), 1000)
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}{mark}{milliseconds:03}"


def _lines(text: str) -> list[str]:
    """As few lines as possible, of about one length."""
    words = WORDS.findall(text)
    count = len(_wrapped(words, COLUMNS))
    narrowest = math.ceil(_width(text) / max(count, 1))
    for columns in range(narrowest, COLUMNS):
        if len(lines := _wrapped(words, columns)) == count:
            return lines
    return _wrapped(words, COLUMNS)


def _wrapped(words: Iterable[str], columns: int) -> list[str]:
    lines: list[str] = []
    for word in words:
        if lines and _width(lines[-1] + word) <= columns:
            lines[-1] += word
        else:
            lines.append(word.lstrip())
    return lines


def _width(text: str) -> int:
    """Columns that ``text`` takes."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def described(transcript: Transcript) -> dict[str, Any]:
    """A transcript as JSON; ``duration`` of the recording, ``start`` and ``end`` are in seconds."""
    spoken = [segment for segment in transcript.segments if segment.text]
    return {
        "text": transcript.text,
        "duration": transcript.metrics["input_audio_seconds"],
        "segments": [{"start": s.shown[0], "end": s.shown[1], "text": s.text} for s in spoken],
        "notes": transcript.notes,
    }
