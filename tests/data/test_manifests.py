"""Other manifests become training data that the checks accept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kimia_infer.data.conversations import ConversationFile, DataError
from kimia_infer.data.manifests import QUESTION, convert_manifest
from tests.command_line import run_here
from tests.training.runs import write_sound

MANIFESTS = {
    "a.csv": 'file_name,transcription\none.wav,"hello, you"\ntwo.wav,good\n',
    "a.tsv": "client\tpath\tsentence\n7\tone.wav\thello, you\n8\ttwo.wav\tgood\n",
    "a.jsonl": '{"audio_filepath": "one.wav", "duration": 1, "text": "hello, you"}\n'
    '\n{"audio_filepath": "two.wav", "text": "good"}\n',
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("one", "two"):
        write_sound(tmp_path / f"{name}.wav", 0.1, 0)
    return tmp_path


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize("name", MANIFESTS)
def test_common_shapes(folder: Path, name: str):
    source = write(folder, name, MANIFESTS[name])
    count, faults = convert_manifest(source, folder / "out.jsonl", folder)
    assert (count, faults) == (2, [])
    conversations = list(ConversationFile(folder / "out.jsonl"))
    for conversation, sound, text in zip(
        conversations, ("one.wav", "two.wav"), ("hello, you", "good"), strict=True
    ):
        assert conversation.output_type == "text"
        question, audio, answer = conversation.messages
        assert (question.text, answer.text, answer.role) == (QUESTION, text, "assistant")
        assert audio.audio == str(folder / sound)


def test_named_fields(folder: Path):
    row = {"wav": "one.wav", "file": "x", "text": "a", "answer": "b", "ask": "What?"}
    source = write(folder, "m.jsonl", json.dumps(row))
    with pytest.raises(DataError, match="2 fields could be the audio; name one with --audio"):
        convert_manifest(source, folder / "out.jsonl", folder)
    with pytest.raises(DataError, match="no field 'label'; name one with --text"):
        convert_manifest(source, folder / "out.jsonl", folder, "wav", "label")
    convert_manifest(source, folder / "out.jsonl", folder, "wav", "answer", "ask")
    (conversation,) = ConversationFile(folder / "out.jsonl")
    assert [message.text for message in conversation.messages] == ["What?", None, "b"]


def test_bad_rows_are_left_out(folder: Path):
    source = write(folder, "m.csv", "path,text\none.wav,hello\nnone.wav,a\ntwo.wav, \n")
    count, faults = convert_manifest(source, folder / "out.jsonl", folder)
    assert count == 1
    assert f"{source}:3: path: " in faults[0]
    assert f"{source}:4: text: expected text" in faults[1]
    source = write(folder, "m.csv", "path,text\nnone.wav,a\n")
    with pytest.raises(DataError, match="no row can be used"):
        convert_manifest(source, folder / "none.jsonl", folder)
    assert not (folder / "none.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.txt", "one.wav hello", "expected a file .csv, .tsv or .jsonl"),
        ("m.csv", "path,text\n", "no rows"),
        ("m.jsonl", "{\n", "m.jsonl:1: not valid JSON"),
        ("m.jsonl", "[1]\n", "m.jsonl:1: expected a JSON object"),
    ],
)
def test_manifests_that_cannot_be_read(folder: Path, name: str, text: str, message: str):
    with pytest.raises(DataError, match=message):
        convert_manifest(write(folder, name, text), folder / "out.jsonl", folder)


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]):
    source = write(folder, "m.csv", MANIFESTS["a.csv"] + "none.wav,a\n")
    target = folder / "out.jsonl"
    assert run_here("convert-manifest", source, target, "--question", "Well?") == 1
    shown = capsys.readouterr()
    assert "2 lines, 1 left out" in shown.out
    assert "no such file" in shown.err and "none.wav" in shown.err
    assert all(c.messages[0].text == "Well?" for c in ConversationFile(target))
