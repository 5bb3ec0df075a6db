"""Transcripts as subtitles."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimia_infer.api.subtitles import cues, srt, vtt
from kimia_infer.api.transcription import TranscriptSegment

LONG = (
    "It was a dark and stormy night, and the rain fell in torrents, except at occasional "
    "intervals, when it was checked by a violent gust of wind which swept up the streets."
)
CHINESE = (
    "今天天气很好，我们一起去公园散步吧。你觉得怎么样？"
    "我觉得这是一个非常好的主意，因为公园里有很多花。"
)

SEGMENTS = [
    TranscriptSegment(0.0, 1.5, "", silent=True),
    TranscriptSegment(1.5, 3.0004, "Hello."),
    TranscriptSegment(3.0004, 3661.9996, "R & B <i>"),
]


def test_srt() -> None:
    assert srt(SEGMENTS) == (
        "1\n00:00:01,500 --> 00:00:03,000\nHello.\n\n2\n00:00:03,000 --> 01:01:02,000\nR & B <i>\n"
    )
    assert srt([]) == ""


def test_a_text_is_shown_while_there_is_sound() -> None:
    segment = TranscriptSegment(0.0, 10.0, "Hello.", speech=(4.0, 5.5))
    assert srt([segment]) == "1\n00:00:04,000 --> 00:00:05,500\nHello.\n"


def test_vtt_escapes_what_it_gives_a_meaning() -> None:
    assert vtt(SEGMENTS) == (
        "WEBVTT\n"
        "\n"
        "00:00:01.500 --> 00:00:03.000\nHello.\n"
        "\n"
        "00:00:03.000 --> 01:01:02.000\nR &amp; B &lt;i&gt;\n"
    )
    assert vtt([]) == "WEBVTT\n"


@pytest.mark.parametrize(("text", "longest"), [(LONG, 42), (CHINESE, 21)])
def test_two_lines_of_about_one_length_at_a_time(text: str, longest: int) -> None:
    shown = list(cues([TranscriptSegment(10.0, 20.0, text)]))
    lines = [line for cue in shown for line in cue.lines]
    assert ("" if text == CHINESE else " ").join(lines) == text
    assert max(map(len, lines)) <= longest
    assert min(map(len, lines[:-1])) > longest / 2
    assert {len(cue.lines) for cue in shown[:-1]} == {2}
    assert shown[0].start == 10.0 and shown[-1].end == pytest.approx(20.0)
    assert all(a.end == b.start for a, b in itertools.pairwise(shown))
    seconds = [(cue.end - cue.start) / sum(map(len, cue.lines)) for cue in shown]
    assert seconds == pytest.approx([seconds[0]] * len(seconds))


@given(st.text(max_size=300))
def test_no_text_breaks_a_file(text: str) -> None:
    segment = TranscriptSegment(0.0, 5.0, text)
    shown = list(cues([segment]))
    assert "".join("".join(line.split()) for cue in shown for line in cue.lines) == "".join(
        text.split()
    )
    assert len(re.findall("^[0-9:,]+ --> [0-9:,]+$", srt([segment]), re.MULTILINE)) >= len(shown)
    assert vtt([segment]).count("-->") == len(shown)
    assert "\n\n\n" not in vtt([segment])
