"""A row that means a part of a recording gets that part from every reader, or is refused."""

from __future__ import annotations

import csv
import io
import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kimia_infer.audio.files import AudioError, load_audio
from kimia_infer.data.conversations import ConversationFile, DataError
from kimia_infer.data.manifests import convert_manifest, read_rows
from kimia_infer.data.parts import Part, PartFields, cut, load_part, selects_sound
from kimia_infer.evaluation.answering import load_ahead
from kimia_infer.evaluation.items import Defaults, read_manifest
from kimia_infer.training.tasks.recordings import find_recordings
from tests.training.runs import write_sound

SECONDS = 1.5
PARTS: list[tuple[dict, Part]] = [
    ({"offset": 0.0, "duration": 0.5}, Part(0.0, 0.5)),
    ({"offset": 0.25, "duration": 0.5}, Part(0.25, 0.75)),
    ({"duration": 0.5}, Part(0.0, 0.5)),
    ({"start": 0.25, "end": "0.75", "offset": None}, Part(0.25, 0.75)),
    ({"start": 0.25, "end": 0.75, "duration": 0.52}, Part(0.25, 0.75)),
    ({"offset": 1, "duration": 1}, Part(1.0, 2.0)),  # rounded up, beyond the end
]
REFUSED = {
    "start, end: expected both or none": {"start": 0.5},
    "start, end: expected a start before the end": {"start": 0.5, "end": 0.5},
    "offset, duration: expected an offset with": {"offset": 0.5},
    "start, offset: expected one of them": {"start": 0, "end": 1, "offset": 0, "duration": 1},
    "duration: expected more than 0": {"offset": 0.5, "duration": 0},
    "duration: 1.5 s, but from start to end it is 1 s": {"start": 0, "end": 1, "duration": 1.5},
    "offset: expected greater than or equal to 0": {"offset": -1, "duration": 1},
    "end: expected a valid number": {"start": 0, "end": "late"},
    "begin_time: not read": {"begin_time": 0.5, "end_time": 1},
    "channel: not read": {"channel": 1},
}
OTHER_TOOLS = (
    "start_time", "end_time", "begin_time", "begin", "stop", "StartTime", "end_ms", "start_sec",
    "segment", "segments", "channel", "channel_id", "channel_selector", "audio_channel",
    "offset_ms", "onset", "start-sample", "segment_start", "Start", "audio_start", "clip_end",
    "startSeconds", "end_frame", "span", "trim", "t_start", "time_end", "frame_offset", "beg",
    "chunk_start", "cut_end", "wav_start", "word_end", "recording_channel", "from", "to", "t0",
    "t1", "tmin", "xmax",
)  # fmt: skip
HARMLESS = (
    "id", "index", "speaker", "channels_count", "sample_rate", "duration_ms", "segment_id",
    "end_of_turn", "started", "gender", "source_url", "timestamp", "backend", "trend",
    "channels_total",
)  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sound(tmp_path_factory.mktemp("parts") / "a.wav", SECONDS, 0)


def piece(sound: Path, part: Part) -> np.ndarray:
    return load_audio(sound)[round(part.start * 16_000) : round(part.end * 16_000)]


def evaluated(folder: Path, row: dict) -> np.ndarray:
    """What an evaluation hears. Raises DataError with the fault of the line."""
    path = folder / "set.jsonl"
    path.write_text(json.dumps(row))
    (turn,) = load_ahead(read_manifest(path, Defaults(folder, language="en")).items, 600.0)
    assert isinstance(turn.waves, dict), turn.waves
    return turn.waves[1]


def converted(folder: Path, row: dict) -> np.ndarray:
    (folder / "set.jsonl").write_text(json.dumps(row))
    convert_manifest(folder / "set.jsonl", folder / "train.jsonl", folder)
    (conversation,) = ConversationFile(folder / "train.jsonl")
    return load_audio(str(conversation.messages[1].audio))


def recorded(folder: Path, row: dict) -> np.ndarray:
    (folder / "set.jsonl").write_text(json.dumps(row))
    (recording,) = find_recordings(folder / "set.jsonl", folder)
    return recording.load()


READERS = [evaluated, converted, recorded]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(("fields", "part"), PARTS)
def test_every_reader_takes_the_part(
    sound: Path, read: Callable[[Path, dict], np.ndarray], fields: dict, part: Part
):
    heard = read(sound.parent, {"audio": "a.wav", "text": "x", **fields})
    assert np.array_equal(heard, piece(sound, part))


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("problem", REFUSED)
def test_every_reader_refuses_what_is_no_part(
    sound: Path, read: Callable[[Path, dict], np.ndarray], problem: str
):
    with pytest.raises(DataError) as caught:
        read(sound.parent, {"audio": "a.wav", "text": "x", **REFUSED[problem]})
    assert f"set.jsonl:1: {problem}" in str(caught.value)


@pytest.mark.parametrize("fields", [*(fields for fields, _ in PARTS), *REFUSED.values()])
def test_conversations_use_whole_recordings(tmp_path: Path, fields: dict):
    message = {"role": "user", "message_type": "audio", "content": "a.wav"}
    answer = {"role": "assistant", "message_type": "text", "content": "x"}
    line = {"task_type": "understanding", "conversation": [message, answer]}
    name = next(name for name, value in fields.items() if value is not None)
    for values, where in (
        (line | fields, name),
        (line | {"conversation": [message | fields, answer]}, f"conversation[0].{name}"),
    ):
        (tmp_path / "train.jsonl").write_text(json.dumps(values))
        with pytest.raises(DataError) as caught:
            ConversationFile(tmp_path / "train.jsonl")[0]
        assert f"train.jsonl:1: {where}: conversations use whole recordings" in str(caught.value)


def test_a_whole_recording_is_not_copied(sound: Path, tmp_path: Path):
    rows = [{"audio": "a.wav", "text": "x", "duration": d} for d in (1.5, 1.46, 1.49999, 2)]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, rows)))
    target = tmp_path / "train.jsonl"
    assert convert_manifest(tmp_path / "set.jsonl", target, sound.parent) == (4, [])
    found = {str(conversation.messages[1].audio) for conversation in ConversationFile(target)}
    assert found == {str(sound)}
    assert not (tmp_path / "train.jsonl.parts").exists()


def test_a_part_of_another_recording_is_refused(sound: Path, tmp_path: Path):
    rows = [{"audio": "a.wav", "text": "x", "offset": o, "duration": 1} for o in (0.2, 1.6, 60)]
    path = tmp_path / "set.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    count, faults = convert_manifest(path, tmp_path / "train.jsonl", sound.parent)
    assert count == 1
    for line, fault in zip((2, 3), faults, strict=True):
        assert fault.startswith(f"{path}:{line}: {sound}: the audio ends at 1.50 s, before ")


def test_what_is_behind_a_part_is_not_decoded(tmp_path: Path):
    samples = np.sin(np.arange(80_000, dtype=np.float32))
    samples[40_000:] = np.nan
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 3, 1, 8000, 32_000, 4, 32)
    data = b"data" + struct.pack("<I", samples.nbytes) + samples.tobytes()
    path = tmp_path / "a.wav"
    path.write_bytes(b"RIFF" + struct.pack("<I", 4 + len(form + data)) + b"WAVE" + form + data)
    with pytest.raises(AudioError, match="not finite"):
        load_audio(path)
    assert np.array_equal(load_part(path, 8000, Part(1, 2)), samples[8000:16_000])
    with pytest.raises(AudioError, match="not finite"):
        load_part(path, 8000, Part(4, 6))


def test_a_part_is_that_of_the_whole(sound: Path):
    part = Part(0.25, 0.75)
    whole = load_audio(sound, sample_rate=24_000)
    assert np.array_equal(load_part(sound, 24_000, part), cut(whole, 24_000, part, "a.wav"))
    with pytest.raises(AudioError, match=r"ends at 1\.50 s"):
        load_part(sound, 24_000, Part(1, 60))


@pytest.mark.parametrize("name", ["channels", "timestamp", "times", "range", "window", "slice"])
def test_names_with_several_meanings_select_if_their_value_does(name: str):
    assert selects_sound(name, [0.5, 1])
    assert not selects_sound(name, 2)
    for other in ("from", "to"):  # languages
        assert not selects_sound(other, "en")


@pytest.mark.parametrize("name", OTHER_TOOLS)
def test_fields_of_other_tools_are_refused(name: str):
    assert selects_sound(name, 0)
    assert not selects_sound(name, None)
    assert not selects_sound(name, " ")
    with pytest.raises(ValidationError, match=f"{name}: not read"):
        PartFields.model_validate({name: 1})


@pytest.mark.parametrize("name", HARMLESS)
def test_other_fields_are_ignored(name: str):
    assert PartFields.model_validate({name: 1}).part is None


@given(st.floats(0, 100), st.floats(0.001, 100), st.floats(0.1, 100))
def test_a_part_is_within_its_recording_or_refused(offset: float, duration: float, length: float):
    wave = np.arange(round(length * 100))
    part = PartFields(offset=offset, duration=duration).part
    assert part is not None
    try:
        found = cut(wave, 100, part, "a.wav")
    except AudioError:
        assert len(wave[round(part.start * 100) : round(part.end * 100)]) == 0 or (
            part.end > len(wave) / 100 + 1
        )
        return
    assert found[0] == round(offset * 100)
    assert abs(len(found) - min(duration * 100, len(wave) - offset * 100)) <= 1


WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=5)


@given(st.lists(st.lists(WORDS, min_size=1, max_size=4), min_size=1, max_size=6), st.booleans())
def test_rows_are_as_wide_as_the_header(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]], tabs: bool
):
    """A row of another width is named by its line and both widths; the others are read."""
    path = tmp_path_factory.getbasetemp() / ("rows.tsv" if tabs else "rows.csv")
    text = io.StringIO(newline="")
    if tabs:
        text.write("\n".join("\t".join(row) for row in [["a", "b"], *rows]))
    else:
        csv.writer(text).writerows([["a", "b"], *rows])
    path.write_text(text.getvalue(), encoding="utf-8", newline="")
    found = list(read_rows(path))
    assert [line for line, _ in found] == list(range(2, len(rows) + 2))
    for (_, values), row in zip(found, rows, strict=True):
        if len(row) == 2:
            assert values == {"a": row[0], "b": row[1]}
        else:
            assert isinstance(values, DataError)
            assert str(values).startswith(f"{len(row)} field")
            assert "the header has 2" in str(values)


def test_the_line_of_a_wide_row_is_named(tmp_path: Path, sound: Path):
    path = tmp_path / "set.csv"
    path.write_text(
        'audio,text\na.wav,"two\nlines"\na.wav,one, two\na.wav\n\na.wav,good\na.wav,"a"b\n'
    )
    faults = [
        f"{path}:4: 3 fields, the header has 2; a text with a comma needs quotes",
        f"{path}:5: 1 field, the header has 2; a text with a comma needs quotes",
        f"{path}:8: not valid CSV (',' expected after '\"')",
    ]
    assert convert_manifest(path, tmp_path / "train.jsonl", sound.parent) == (2, faults)
    manifest = read_manifest(path, Defaults(sound.parent, language="en"))
    assert [item.reference for item in manifest.items] == ["two\nlines", "good"]
    assert manifest.faults == faults


def test_a_quote_that_is_not_closed_is_named(tmp_path: Path):
    path = tmp_path / "set.csv"
    path.write_text('audio,text\na.wav,good\na.wav,"open\na.wav,swallowed\n')
    first, (line, fault) = read_rows(path)
    assert first == (2, {"audio": "a.wav", "text": "good"})
    assert (line, str(fault)) == (3, "not valid CSV (unexpected end of data)")


@pytest.mark.parametrize("name", ["set.csv", "set.tsv"])
def test_two_columns_of_one_name_are_refused(tmp_path: Path, name: str):
    comma = "," if name == "set.csv" else "\t"
    (tmp_path / name).write_text("audio,text,text\na.wav,x,y\n".replace(",", comma))
    with pytest.raises(DataError, match="two columns are called 'text'"):
        list(read_rows(tmp_path / name))
