"""From recordings to data, with tools that know what is in them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from kimia_infer.audio.files import SAMPLE_RATE, load_audio, write_wav
from kimia_infer.data.conversations import ConversationFile, DataError
from kimia_infer.data.pipeline.filters import Limits
from kimia_infer.data.pipeline.make import DOCUMENT, Made, Tools, make_data
from kimia_infer.data.pipeline.quality import Quality
from kimia_infer.data.pipeline.recognition import Heard
from kimia_infer.data.pipeline.report import spread, write_report
from kimia_infer.data.pipeline.turns import Turn
from tests.data.pipeline.made import noise

SECONDS = 12
TURNS = [Turn(0, 2, 0), Turn(3, 5, 1), Turn(6, 8, 0), Turn(9, 11, 1)]
TEXTS = [
    "the first of all",
    "thank you thank you thank you",
    "what is third here",
    "and a last one",
]


class Known:
    """Finds TURNS, and hears the text of the place where each begins; ``stop_at`` interrupts."""

    name, together = "known", 1

    def __init__(self, stop_at: int | None = None):
        self.heard: list[str] = []
        self._stop_at = stop_at

    def speech(self, wave: np.ndarray) -> list[tuple[float, float]]:
        return [(turn.start, turn.end) for turn in TURNS]

    def turns(self, wave: np.ndarray, speech: Sequence[tuple[float, float]]) -> list[Turn]:
        assert len(wave) == SECONDS * SAMPLE_RATE and speech
        return TURNS

    def measure(self, wave: np.ndarray) -> Quality:
        return Quality(-20.0, 0.0, 7000.0, 3.5)

    def hear(self, wave: np.ndarray) -> Heard:
        if self._stop_at == len(self.heard):
            raise KeyboardInterrupt
        # The loudness of a turn is its number.
        text = TEXTS[round(float(np.abs(wave).max()) * 10) - 1]
        self.heard.append(text)
        return Heard(text, "en", 0.9, -0.3)


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    wave = np.zeros(SECONDS * SAMPLE_RATE)
    for number, turn in enumerate(TURNS, 1):
        begin, end = (round(seconds * SAMPLE_RATE) for seconds in (turn.start, turn.end))
        piece = noise(end - begin, number)
        wave[begin:end] = piece / np.abs(piece).max() * number / 10
    path = tmp_path / "talk.wav"
    write_wav(path, wave, SAMPLE_RATE)
    return path


def made_by(known: Known, paths: Sequence[Path], output: Path, limits: Limits = Limits()) -> Made:  # noqa: B008
    return make_data(paths, output, Tools(known, known, known, known), limits)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_what_is_written(recording: Path, tmp_path: Path) -> None:
    output = tmp_path / "data"
    made = made_by(Known(), [recording], output)
    assert made.faults() == {"repeated": (1, 2.0)}
    conversations = lines(output / "conversations.jsonl")
    answers = [values["conversation"][2]["content"] for values in conversations]
    assert answers == [TEXTS[0], TEXTS[2], TEXTS[3]]
    source = conversations[1]["source"]
    assert (source["recording"], source["start"], source["end"]) == (str(recording), 6, 8)
    # The sound is that of the recording, with a little of the silence around it.
    audio = load_audio(output / conversations[1]["conversation"][1]["content"])
    whole = load_audio(recording)
    start = round((6 - 0.15) * SAMPLE_RATE)
    assert np.array_equal(audio, whole[start : start + len(audio)])
    assert len(audio) == pytest.approx(2.3 * SAMPLE_RATE, abs=2)
    # Both kinds of lines are read as training data.
    file = ConversationFile(output / "conversations.jsonl")
    assert [file[index].output_type for index in range(len(file))] == ["text"] * 3
    documents = ConversationFile(output / "documents.jsonl")
    assert [documents[index].task_type for index in range(2)] == [DOCUMENT] * 2
    assert [len(documents[index].messages) for index in range(2)] == [1, 2]
    rows = lines(output / "segments.jsonl")
    assert [row["fault"] for row in rows] == [None, "repeated", None, None]


def test_an_interrupted_run_goes_on(recording: Path, tmp_path: Path) -> None:
    output = tmp_path / "data"
    first = Known(stop_at=2)
    with pytest.raises(KeyboardInterrupt):
        made_by(first, [recording], output)
    second = Known()
    made_by(second, [recording], output)
    assert sorted(first.heard + second.heard) == sorted(TEXTS)
    third = Known(stop_at=0)
    whole = made_by(third, [recording], tmp_path / "data")
    assert whole.segments == made_by(Known(), [recording], tmp_path / "again").segments


def test_recordings_that_cannot_be_read_are_listed(recording: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.wav"
    bad.write_bytes(b"no sound")
    made = made_by(Known(), [bad, recording], tmp_path / "data")
    assert [row["recording"] for row in made.unreadable] == [str(bad)]
    assert len(made.kept) == 3
    with pytest.raises(DataError, match=r"no recording can be used; the first: .*bad\.wav"):
        made_by(Known(), [bad], tmp_path / "other")


def test_a_repaired_recording_is_read_again(recording: Path, tmp_path: Path) -> None:
    bad, output = tmp_path / "bad.wav", tmp_path / "data"
    bad.write_bytes(b"no sound")
    for _ in range(2):
        assert len(made_by(Known(), [bad, recording], output).unreadable) == 1
    assert len([row for row in lines(output / "journal.jsonl") if "error" in row]) == 1
    bad.write_bytes(recording.read_bytes())
    made = made_by(Known(), [bad, recording], output)
    assert not made.unreadable and len(made.kept) == 6
    assert made_by(Known(stop_at=0), [bad, recording], output).segments == made.segments


def test_segments_are_no_recordings(recording: Path, tmp_path: Path) -> None:
    output = tmp_path / "data"
    made = made_by(Known(), [recording], output)
    cut = sorted((output / "audio").rglob("*.wav"))
    assert len(cut) == 4
    assert made_by(Known(stop_at=0), [recording, *cut], output).segments == made.segments
    with pytest.raises(DataError, match="segments of an earlier run are no recordings"):
        made_by(Known(), cut, output)


def test_other_limits_or_recordings_need_another_output(recording: Path, tmp_path: Path) -> None:
    output = tmp_path / "data"
    made_by(Known(), [recording], output)
    with pytest.raises(DataError, match="other limits or recognizers; name another output"):
        made_by(Known(), [recording], output, Limits(score=3.0))
    with pytest.raises(KeyboardInterrupt):
        made_by(Known(stop_at=1), [recording], tmp_path / "cut")
    write_wav(recording, noise(SECONDS * SAMPLE_RATE, 7) / 10, SAMPLE_RATE)
    with pytest.raises(DataError, match=r"talk\.wav: has changed"):
        made_by(Known(), [recording], tmp_path / "cut")
    recording.write_bytes(b"no sound")
    with pytest.raises(DataError, match=r"talk\.wav: has changed since the work began: "):
        made_by(Known(), [recording], tmp_path / "cut")


def test_the_page_has_counts_and_sounds(recording: Path, tmp_path: Path) -> None:
    output = tmp_path / "data"
    page = write_report(made_by(Known(), [recording], output), output, Limits()).read_text("utf-8")
    assert "<td>repeated</td><td>1</td><td>0.0 min</td>" in page
    assert page.count("<audio ") == 4 and "http" not in page
    assert TEXTS[2] in page and "<figcaption>DNSMOS: 3.5 to 3.5" in page


def test_sounds_are_from_all_of_the_data() -> None:
    rows = [{"number": number} for number in range(10)]
    assert [row["number"] for row in spread(rows, 4)] == [0, 3, 6, 9]
    assert spread([], 4) == [] and spread(rows[:1], 4) == rows[:1]
