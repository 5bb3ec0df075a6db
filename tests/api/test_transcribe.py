"""Recordings of any length: segments that cover them, each answered on its own."""

from __future__ import annotations

import gc
import itertools
import json
import os
import shutil
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kimia_infer.api.events import TextDelta
from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.request import Deadline, Request, Response
from kimia_infer.api.transcription import (
    INSTRUCTION,
    Transcript,
    TranscriptSegment,
    _JoinedText,
    separator,
)
from kimia_infer.audio.files import SAMPLE_RATE, AudioError, AudioTooLong, load_audio
from kimia_infer.utils.errors import (
    CheckpointError,
    RequestCancelled,
    RequestError,
    RequestTimeout,
)
from tests.api.sounds import noise, recording, wav_bytes
from tests.scripted import script

LIMIT = {"max_new_tokens": 30}


@pytest.fixture(scope="module")
def model(golden: Path) -> KimiAudio:
    return KimiAudio(str(golden / "e2e" / "checkpoint"), load_detokenizer=False, device="cpu")


@pytest.fixture(scope="module")
def sound(golden: Path, long: bool) -> bytes:
    """75 seconds, or 10 minutes in long tests."""
    return wav_bytes(recording(golden, 600 if long else 75))


@pytest.fixture(scope="module")
def transcript(model: KimiAudio, sound: bytes) -> Transcript:
    return model.transcribe(sound, **LIMIT)


def check_cover(segments: list[TranscriptSegment], seconds: float) -> None:
    assert segments[0].start == 0
    assert segments[-1].end == pytest.approx(seconds)
    assert all(a.end == b.start for a, b in itertools.pairwise(segments))
    spoken = [segment for segment in segments if not segment.silent]
    assert all(0 < segment.end - segment.start <= 30 for segment in spoken)


def copy_with(golden: Path, target: Path, **fields: object) -> Path:
    """The recorded checkpoint, by links, with more fields in its generation_config.json."""
    shutil.copytree(golden / "e2e" / "checkpoint", target, copy_function=os.symlink)
    path = target / "generation_config.json"
    values = json.loads(path.read_text()) if path.exists() else {}
    path.unlink(missing_ok=True)
    path.write_text(json.dumps(values | fields))
    return target


def test_a_checkpoint_may_want_shorter_segments(golden: Path, tmp_path: Path):
    model = KimiAudio(
        str(copy_with(golden, tmp_path / "short", segment_seconds=4)),
        load_detokenizer=False,
        device="cpu",
    )
    segments = model.transcribe(wav_bytes(recording(golden, 15)), max_new_tokens=2).segments
    assert len(segments) >= 4
    assert all(segment.end - segment.start <= 4 for segment in segments)


@pytest.mark.parametrize("seconds", [1, 31, "8", True, None])
def test_segments_of_another_length_are_refused(golden: Path, tmp_path: Path, seconds: object):
    directory = copy_with(golden, tmp_path / "odd", segment_seconds=seconds)
    with pytest.raises(CheckpointError, match=r"generation_config.json: segment_seconds"):
        KimiAudio(str(directory), load_detokenizer=False, device="cpu")


def test_segments_cover_the_recording(sound: bytes, transcript: Transcript) -> None:
    seconds = len(load_audio(sound)) / SAMPLE_RATE
    check_cover(transcript.segments, seconds)
    assert len(transcript.segments) >= seconds / 30
    metrics = transcript.metrics
    assert metrics["segments"] == len(transcript.segments)
    assert metrics["input_audio_seconds"] == seconds
    assert metrics["decode_steps"] >= len(transcript.segments)
    assert metrics["text_tokens"] > 0
    assert "seed" in metrics
    assert metrics["quantization"] == metrics["kv_cache"] == metrics["offload"] == "none"


def test_each_segment_is_answered_on_its_own(
    model: KimiAudio, sound: bytes, transcript: Transcript
) -> None:
    wave = load_audio(sound)
    texts = []
    for segment in transcript.segments:
        piece = wave[round(segment.start * SAMPLE_RATE) : round(segment.end * SAMPLE_RATE)]
        chat = [
            {"role": "user", "message_type": "text", "content": INSTRUCTION},
            {"role": "user", "message_type": "audio", "content": wav_bytes(piece)},
        ]
        _, text = model.generate(chat, **LIMIT)
        assert segment.text == text.strip()
        texts.append(text.strip())
    joined = ""
    for text in texts:
        joined += separator(joined, text) + text
    assert transcript.text == joined


def test_pieces_joined_are_the_text(model: KimiAudio, sound: bytes, transcript: Transcript) -> None:
    events = list(model.stream_transcription(sound, **LIMIT))
    assert isinstance(events[-1], Transcript)
    assert events[-1].text == transcript.text
    segments = [event for event in events if isinstance(event, TranscriptSegment)]
    assert segments == transcript.segments == events[-1].segments
    deltas = [event.text for event in events if isinstance(event, TextDelta)]
    assert "".join(deltas) == transcript.text
    first = next(i for i, event in enumerate(events) if isinstance(event, TranscriptSegment))
    said = "".join(event.text for event in events[:first])
    assert said == segments[0].text, "text comes before the segment that it belongs to is closed"


def test_no_more_is_read_than_can_be_answered(
    model: KimiAudio, sound: bytes, transcript: Transcript, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a segment is encoded, no more than one for each slot is in memory."""
    slots = 2
    monkeypatch.setattr(model.decoder, "slots", slots)
    begin, waves = KimiAudio.begin, []

    def watched(self: KimiAudio, request: Request) -> Response:
        (wave,) = request.waves.values()
        assert len(wave) <= 30 * SAMPLE_RATE
        gc.collect()
        assert sum(reference() is not None for reference in waves) < slots + 1
        waves.append(weakref.ref(wave))
        return begin(self, request)

    monkeypatch.setattr(KimiAudio, "begin", watched)
    assert model.transcribe(sound, **LIMIT).text == transcript.text
    assert len(waves) == len(transcript.segments)


def test_closing_gives_up_all_segments(model: KimiAudio, sound: bytes) -> None:
    events = model.stream_transcription(sound)
    next(events)
    events.close()
    while model.scheduler.taken or model.scheduler.queued:
        time.sleep(0.001)
    assert model.decoder.room.spans.free == model.decoder.room.spans.places


def test_silent_segments_are_not_answered(
    model: KimiAudio, golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speech = recording(golden, 20)
    wave = np.concatenate([speech, np.zeros(40 * SAMPLE_RATE, np.float32), speech])
    seconds: list[float] = []
    encode = model.speech_codes.encode_all

    def watched(waves: list[np.ndarray]) -> list[Tensor]:
        seconds.extend(len(wave) / SAMPLE_RATE for wave in waves)
        return encode(waves)

    monkeypatch.setattr(model.speech_codes, "encode_all", watched)
    transcript = model.transcribe(wav_bytes(wave), **LIMIT)
    check_cover(transcript.segments, 80)
    silent = [segment.silent for segment in transcript.segments]
    assert silent == [False, True, False]
    assert transcript.segments[1].text == ""
    assert len(seconds) == 2
    assert transcript.metrics["silent_segments"] == 1
    assert any("s are silent" in note for note in transcript.notes)


def test_a_silent_recording_has_no_text(model: KimiAudio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        model.speech_codes, "encode_all", lambda waves: pytest.fail("encoded silence")
    )
    transcript = model.transcribe(wav_bytes(np.zeros(70 * SAMPLE_RATE)))
    assert transcript.segments == [TranscriptSegment(0.0, 70.0, "", silent=True)]
    assert transcript.text == ""
    [note] = transcript.notes
    assert note.startswith("70.00 of 70.00 s are silent (below -70 dBFS)")


def test_loops_are_stopped(model: KimiAudio, monkeypatch: pytest.MonkeyPatch) -> None:
    said, unit = model.text_tokenizer.encode("so "), model.text_tokenizer.encode("loop ")
    script(monkeypatch, model, text=said + unit * 2000)
    sound = wav_bytes(noise(6))
    transcript = model.transcribe(sound)
    [segment] = transcript.segments
    assert segment.repetition
    assert segment.text == transcript.text == "so loop"
    assert transcript.metrics["repetition_segments"] == 1
    assert transcript.metrics["decode_steps"] < len(said) + 200
    assert any("repeated" in note for note in transcript.notes)
    whole = model.transcribe(sound, stop_repetition=False, max_new_tokens=900)
    assert not whole.segments[0].repetition
    assert whole.metrics["decode_steps"] == 900
    assert len(whole.text) > 500


def test_what_can_be_said_is_not_stopped(model: KimiAudio, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = model.text_tokenizer.encode("ha ") * 200
    script(monkeypatch, model, text=ids[:470])
    transcript = model.transcribe(wav_bytes(noise(30)))
    assert not transcript.segments[0].repetition
    assert transcript.metrics["text_tokens"] == len(ids[:470])


def test_progress_and_stopping(model: KimiAudio, sound: bytes, transcript: Transcript) -> None:
    calls: list[tuple[float, float]] = []
    model.transcribe(sound, on_progress=lambda *call: calls.append(call), **LIMIT)
    total = transcript.segments[-1].end
    assert calls == sorted(calls)
    assert calls[-1] == (total, total)
    assert {seconds for seconds, _ in calls} == {
        *(segment.start for segment in transcript.segments),
        total,
    }
    assert len(calls) > 2 * len(transcript.segments)

    class Stop(BaseException):
        pass

    def stop(seconds: float, total: float) -> None:
        if seconds > 0:
            raise Stop

    with pytest.raises(Stop):
        model.transcribe(sound, on_progress=stop, **LIMIT)


@pytest.mark.parametrize("kind", [TextDelta, TranscriptSegment])
def test_closing_launches_no_further_step(model: KimiAudio, sound: bytes, kind: type) -> None:
    """Within a segment, and between two."""
    calls: list[float] = []
    events = model.stream_transcription(
        sound, on_progress=lambda seconds, _: calls.append(seconds), **LIMIT
    )
    next(event for event in events if isinstance(event, kind))
    events.close()
    assert set(calls) == {0.0}
    seen = list(calls)
    assert list(events) == []
    assert calls == seen


def test_refusals(model: KimiAudio) -> None:
    sound = wav_bytes(noise(3))
    with pytest.raises(RequestError, match="output_type"):
        model.stream_transcription(sound, output_type="both")
    with pytest.raises(RequestError, match="max_new_tokens"):
        model.stream_transcription(sound, max_new_tokens=0)
    with pytest.raises(RequestError, match="instruction: expected text"):
        model.stream_transcription(sound, instruction=3)
    with pytest.raises(AudioTooLong, match="longer than the permitted 2 s"):
        model.transcribe(sound, max_seconds=2)
    with pytest.raises(AudioError):
        model.transcribe(b"no sound")
    with pytest.raises(RequestTimeout, match=r"timeout_seconds.*1e-06 s"):
        model.transcribe(sound, timeout_seconds=1e-6)


def test_a_transcription_is_cancelled_between_events(model: KimiAudio, sound: bytes) -> None:
    deadline, gate, launch = Deadline(None), threading.Semaphore(10), model.decoder._launch

    def step() -> None:
        assert gate.acquire(timeout=60)
        launch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.decoder, "_launch", step)  # so that it does not end before
        events = model.stream_transcription(sound, deadline=deadline, **LIMIT)
        next(events)
        deadline.cancel()
        gate.release(100)
        with pytest.raises(RequestCancelled):
            list(events)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("Hello.", "World", " "),
        ("", "World", ""),
        ("Hello", "", ""),
        ("你好。", "世界", ""),
        ("你好", "Kimi", ""),
        ("こんにちは", "世界", ""),
        ("안녕하세요", "여러분", " "),
        ("Привет", "мир", " "),
    ],
)
def test_separator(before: str, after: str, expected: str) -> None:
    assert separator(before, after) == expected


PIECES = st.lists(st.text("a b\n你", max_size=4), max_size=5)


@given(st.lists(PIECES, max_size=5))
def test_joined_text(segments: list[list[str]]) -> None:
    joined, added = _JoinedText(), ""
    for pieces in segments:
        joined.begin_segment()
        added += "".join([joined.push(piece) for piece in pieces])
    expected = ""
    for pieces in segments:
        text = "".join(pieces).strip()
        expected += separator(expected, text) + text
    assert added == joined.text == expected
