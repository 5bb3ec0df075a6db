"""Code extraction: complete, in order, and continued after an interruption."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kimia_infer.audio.files import load_audio
from kimia_infer.data.conversations import ConversationFile, DataError
from kimia_infer.data.extraction import extract_codes
from kimia_infer.models.kimi_audio.checkpoint import SPEECH_TOKENIZER_FOLDER
from kimia_infer.models.kimi_audio.components import speech_tokenizer_component
from kimia_infer.models.kimi_audio.config import LanguageModelConfig
from kimia_infer.models.kimi_audio.encoders import SpeechCodes
from tests.paths import MINI
from tests.training.runs import write_data, write_sound

OFFSET = LanguageModelConfig.from_directory(MINI).token_offset


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path)


def extract(data: Path, workers: int = 1) -> tuple[int, list[dict]]:
    return extract_codes(data, target_of(data), MINI, data.parent, "cpu", workers)


def target_of(data: Path) -> Path:
    return data.with_name("codes.jsonl")


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def expected_lines(data: Path) -> list[dict]:
    folder = MINI / SPEECH_TOKENIZER_FOLDER
    module = speech_tokenizer_component(folder).load(torch.device("cpu"), torch.float32)
    codes = SpeechCodes(module, folder)
    lines = read(data)
    for line in lines:
        for message in line["conversation"]:
            if message["message_type"] == "audio":
                wave = load_audio(data.parent / message["content"])
                message["audio_tokens"] = (codes.encode(wave) + OFFSET).tolist()
    return lines


@pytest.mark.parametrize("workers", [1, 2])
def test_all_sounds_get_their_codes(data: Path, workers: int, long: bool):
    if workers > 1 and not long:
        pytest.skip("starting processes takes ten seconds; run with --long")
    lines = read(data)
    assert extract(data, workers) == (len(lines), [])
    assert read(target_of(data)) == expected_lines(data)
    left = {path.name for path in data.parent.iterdir() if path.suffix != ".wav"}
    assert left == {data.name, target_of(data).name}


def test_bad_lines_are_left_out_and_listed(data: Path):
    lines = read(data)
    (data.parent / lines[0]["conversation"][1]["content"]).unlink()
    (data.parent / lines[3]["conversation"][1]["content"]).write_bytes(b"no sound")
    lines[2]["conversation"][0]["role"] = "robot"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{\n")
    written, faults = extract(data)
    assert written == len(lines) - 3
    assert [fault["line"] for fault in faults] == [1, 3, 4, 6]
    assert read(data.with_name("codes.jsonl.bad.jsonl")) == faults
    fields = ["conversation[1].content", "conversation[0].role", "conversation[1].content"]
    for fault, field in zip(faults, fields, strict=False):
        assert f"{data}:{fault['line']}: {field}: " in fault["error"]
    found = [line["conversation"][2]["content"] for line in read(target_of(data))]
    assert found == [lines[i]["conversation"][2]["content"] for i in (1, 4)]


def test_an_interrupted_extraction_continues(data: Path, monkeypatch):
    encoded, encode = [], SpeechCodes.encode

    def interrupted(self, wave):
        if len(encoded) == 3:
            raise KeyboardInterrupt
        encoded.append(len(wave))
        return encode(self, wave)

    monkeypatch.setattr(SpeechCodes, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        extract(data)
    assert not target_of(data).exists()
    journal = data.with_name("codes.jsonl.journal")
    kept = journal.read_bytes()
    journal.write_bytes(kept + b'{"index": 4, "co')  # as a crash while writing leaves it
    before = len(encoded)
    finished = kept.count(b"\n") - 1
    assert 0 < finished < len(read(data))
    monkeypatch.setattr(SpeechCodes, "encode", lambda self, w: encoded.append(0) or encode(self, w))
    extract(data)
    sounds = [sum(m["message_type"] == "audio" for m in x["conversation"]) for x in read(data)]
    assert len(encoded) - before == sum(sounds[finished:])
    assert read(target_of(data)) == expected_lines(data)
    assert not journal.exists()


def test_codes_that_are_there_are_kept_and_failed_ones_computed(data: Path):
    lines = read(data)
    lines[0]["conversation"][1]["audio_tokens"] = [OFFSET, OFFSET + 1]
    lines[1]["conversation"][1]["audio_tokens"] = []
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    extract(data)
    found, expected = read(target_of(data)), expected_lines(data)
    assert found[0] == lines[0]
    assert found[1:] == expected[1:]


def test_nothing_is_overwritten_or_mixed(data: Path, monkeypatch):
    target_of(data).write_text("mine")
    with pytest.raises(DataError, match="exists"):
        extract(data)
    assert target_of(data).read_text() == "mine"
    target_of(data).unlink()
    monkeypatch.setattr(SpeechCodes, "encode", lambda self, wave: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        extract(data)
    write_sound(data.parent / "new.wav", 0.2, 9)
    data.write_text(data.read_text() + data.read_text().splitlines()[0] + "\n")
    with pytest.raises(DataError, match="was begun from other data"):
        extract(data)


def test_the_result_is_training_data(data: Path):
    extract(data)
    file = ConversationFile(target_of(data))
    assert all(conversation.audio_ids for conversation in file)
