"""Where audio comes from: files and memory give the same answers, and faults name the field."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kimia_infer.api import request
from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.parameters import parse_parameters
from kimia_infer.audio.files import SAMPLE_RATE, AudioError
from kimia_infer.data.conversations import DataError, parse_conversation
from kimia_infer.utils.errors import ConfigurationError, RequestError, RequestTimeout
from tests.api.sounds import noise, wav_bytes
from tests.clock import set_clock

HELLO = {"role": "user", "message_type": "text", "content": "hello"}
EMPTY = {"role": "user", "message_type": None}
PCM = np.rint(noise(2) * 32_768).clip(-32_768, 32_767).astype("<i2")
WAV = wav_bytes(PCM / 32_768)
IN_MEMORY = {
    "data set": {"array": PCM / 32_768, "sampling_rate": SAMPLE_RATE, "path": "question.wav"},
    "numpy": (PCM, SAMPLE_RATE),
    "torch, two channels": (torch.from_numpy(PCM).repeat(2, 1), SAMPLE_RATE),
}

Ask = Callable[[KimiAudio, Any], object]
ASK: dict[str, Ask] = {
    "chats[1].content": lambda model, audio: model.generate(
        [HELLO, {"role": "user", "message_type": "audio", "content": audio}], max_new_tokens=5
    ),
    "audio": lambda model, audio: model.transcribe(audio, max_new_tokens=5, seed=0).text,
    "voice": lambda model, audio: model.generate(
        [HELLO], "both", voice=audio, max_new_tokens=20, seed=0
    )[0],
}


@dataclass
class Limited:
    """A model whose answers may take so many seconds."""

    model: KimiAudio
    seconds: float

    def generate(self, *arguments: Any, **options: Any) -> Any:
        return self.model.generate(*arguments, **options, timeout_seconds=self.seconds)

    def transcribe(self, *arguments: Any, **options: Any) -> Any:
        return self.model.transcribe(*arguments, **options, timeout_seconds=self.seconds)


@pytest.fixture(scope="module")
def model(golden: Path) -> KimiAudio:
    return KimiAudio(str(golden / "e2e" / "checkpoint"), device="cpu")


@pytest.mark.parametrize("form", IN_MEMORY)
@pytest.mark.parametrize("where", ASK)
def test_sound_in_memory_is_answered_as_its_file(model: KimiAudio, where: str, form: str) -> None:
    found, expected = (ASK[where](model, audio) for audio in (IN_MEMORY[form], WAV))
    if where == "voice":
        assert torch.equal(found, expected)
    else:
        assert found == expected


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (3, "expected an audio file path, the bytes of a file, or sound in memory .* found int"),
        (PCM, "sound in memory .* found ndarray"),
        ((PCM, 0), "sampling_rate: expected"),
        ((PCM[:0], SAMPLE_RATE), "array: no sound in it"),
        (b"", "audio data: empty file"),
        (b"no sound", "audio data: not readable as sound"),
    ],
    ids=["number", "no rate", "bad rate", "empty", "no bytes", "text"],
)
@pytest.mark.parametrize("where", ASK)
def test_faults_name_the_field(model: KimiAudio, where: str, audio: Any, message: str) -> None:
    with pytest.raises(RequestError) as refused:
        ASK[where](model, audio)
    assert str(refused.value).startswith(f"{where}: ")
    assert refused.match(message)


@pytest.mark.parametrize("where", ASK)
def test_what_is_not_a_file_is_called_what_it_is(
    model: KimiAudio, where: str, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("gone")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for name, kind in {
            "missing.wav": "no such file: {}",
            "no/where.wav": "no such file: {}",
            "link": "no such file: {}",
            "a\0b": "no such file: {}",
            ".": "{} is a directory",
            "pipe": "{} is a pipe",
            "socket": "{} is a socket",
            "/dev/null": "{} is a device",
        }.items():
            path = f"{tmp_path}/{name}" if name[0] != "/" else name
            with pytest.raises(AudioError) as refused:
                ASK[where](model, path)
            assert str(refused.value).startswith(f"{where}: {kind.format(repr(path))}")


def notes(model: KimiAudio, where: str, audio: Any) -> list[str]:
    """The notes of an answer to ``audio`` in one of three places."""
    if where == "audio":
        return model.transcribe(audio, max_new_tokens=2).notes
    if where == "voice":
        options = parse_parameters(output_type="both", max_new_tokens=2, seed=0)
        found = model.complete([HELLO], options, voice=audio).notes
        return [note for note in found if "no text" not in note]
    message = {"role": "user", "message_type": "audio", "content": audio}
    return model.complete([HELLO, message], parse_parameters(max_new_tokens=2)).notes


@pytest.mark.parametrize("where", ASK)
def test_what_was_noted_while_reading_names_the_field(model: KimiAudio, where: str) -> None:
    antiphase = (np.stack([PCM // 2, -(PCM // 2)]), SAMPLE_RATE)
    for _ in range(2):  # the voice is not read again
        [note] = notes(model, where, antiphase)
        assert note.startswith(f"{where}: its channels cancel each other in 2.0 of 2.0 s")
    assert notes(model, where, WAV) == []


@pytest.mark.parametrize("value", [0.01, -0.5])
def test_a_constant_value_is_no_silence(model: KimiAudio, value: float) -> None:
    constant = (np.full(2 * SAMPLE_RATE, value), SAMPLE_RATE)
    held = f"one constant value ({value} of full scale), no sound"
    assert notes(model, "chats[1].content", constant) == [
        f"chats[1].content: the audio holds {held}"
    ]
    [note] = notes(model, "audio", constant)
    assert note == f"2.00 of 2.00 s hold {held}, and have no text"
    with pytest.raises(AudioError, match="voice: the recording holds one constant value"):
        ASK["voice"](model, constant)
    [note] = notes(model, "chats[1].content", (np.zeros(2 * SAMPLE_RATE), SAMPLE_RATE))
    assert note.startswith("chats[1].content: the audio is silent (-120 dBFS at its loudest")


@pytest.mark.parametrize("rate", [SAMPLE_RATE, 48_000])
@pytest.mark.parametrize("where", ASK)
def test_the_time_limit_holds_while_audio_is_read(
    model: KimiAudio, monkeypatch: pytest.MonkeyPatch, where: str, rate: int
) -> None:
    """Nothing is encoded once the time is over, which is 1 s later whenever it is asked for."""
    clock = itertools.count()
    set_clock(monkeypatch, request, lambda: float(next(clock)))
    monkeypatch.setattr(model.speech_codes, "encode_all", lambda waves: pytest.fail("encoded"))
    monkeypatch.setattr(model.whisper_features, "encode_all", lambda waves: pytest.fail("encoded"))
    monkeypatch.setattr(model, "begin", lambda request: pytest.fail("answered"))
    audio = wav_bytes(noise(25, rate), rate)
    with pytest.raises(RequestTimeout, match=r"timeout_seconds: .* 0\.5 s"):
        ASK[where](Limited(model, 0.5), audio)


def test_the_time_limit_holds_in_silence(model: KimiAudio, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    set_clock(monkeypatch, request, lambda: float(next(clock)))
    silence = wav_bytes(np.zeros(15 * 60 * SAMPLE_RATE))
    events = model.stream_transcription(silence, timeout_seconds=40)
    with pytest.raises(RequestTimeout):
        list(events)
    assert 40 <= next(clock) <= 43, "30 blocks in a first pass, the rest in the second"


@pytest.mark.parametrize(
    "chats",
    [[], (), [EMPTY], [EMPTY, EMPTY | {"role": "assistant"}], [HELLO | {"content": " \n"}, EMPTY]],
    ids=["none", "tuple", "no content", "two", "white space"],
)
def test_chats_without_content_are_refused(model: KimiAudio, chats: Any) -> None:
    for output_type in ("text", "both"):
        with pytest.raises(RequestError, match="chats: nothing to answer"):
            model.generate(chats, output_type)
    assert model.generate([*chats, HELLO], max_new_tokens=2)


def test_training_data_has_paths_alone() -> None:
    """A line of JSON that holds samples is no line of the published format."""
    sound = {"array": [0.0, 0.1], "sampling_rate": SAMPLE_RATE}
    for content in (sound, [0.0, SAMPLE_RATE]):
        message = {"role": "user", "message_type": "audio", "content": content}
        with pytest.raises(DataError, match=r"conversation\[0\]\.content: expected .*path"):
            parse_conversation({"task_type": "understanding", "conversation": [message]})


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "gpu", "meta", "", 3.5, torch.device("xpu")])
def test_impossible_devices_are_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, device: Any
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    with pytest.raises(ConfigurationError, match=r"^device: expected one of .* \(cpu\), found"):
        KimiAudio("no/such/checkpoint", device=device)
