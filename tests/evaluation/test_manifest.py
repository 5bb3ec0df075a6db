"""Manifests of several shapes become items; lines that cannot be used are told apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kimia_infer.api.transcription import INSTRUCTION
from kimia_infer.data.conversations import DataError
from kimia_infer.data.manifests import parse_language
from kimia_infer.evaluation.items import Defaults, read_manifest
from tests.evaluation.helpers import Write

ENGLISH = Defaults(Path("/sounds"), language="en")


def user(kind: str, content: object) -> dict:
    return {"role": "user", "message_type": kind, "content": content}


def test_a_transcription_is_asked_for_as_published(write: Write):
    path = write({"audio": "a.wav", "text": "hello"})
    (item,) = read_manifest(path, ENGLISH).items
    assert item.messages == [user("text", INSTRUCTION), user("audio", "/sounds/a.wav")]
    assert item.key == ("set", "", "1")
    assert (item.metric, item.reference, item.language) == ("wer", "hello", "en")
    assert item.recordings == {1: "/sounds/a.wav"}


@pytest.mark.parametrize("language", ["zh", "zh-CN", "cmn_hans_cn", "ja", "yue", "th"])
def test_languages_without_spaces_count_characters(write: Write, language: str):
    path = write({"audio": "a.wav", "text": "你好", "language": language})
    assert read_manifest(path, ENGLISH).items[0].metric == "cer"


def test_rows_of_the_published_evaluation_are_understood(write: Write):
    row = {
        "index": 7,
        "audio_path": "/data/a.wav",
        "question": "What is it?\n(A) Man (B) Woman",
        "choices": ["Man", "Woman"],
        "answer": "Woman",
        "subset": "speech",
        "task_type": "understanding",
    }
    (item,) = read_manifest(write(row, name="mmau"), ENGLISH).items
    assert item.key == ("mmau", "speech", "7")
    assert item.messages == [user("text", row["question"]), user("audio", "/data/a.wav")]
    assert (item.metric, item.choices) == ("accuracy", ("Man", "Woman"))


def test_an_empty_question_is_sound_alone(write: Write):
    path = write({"audio": "a.wav", "question": "", "metric": "none"})
    (item,) = read_manifest(path, ENGLISH).items
    assert item.messages == [user("audio", "/sounds/a.wav")]
    assert (item.question, item.reference) == ("", "")


def test_conversation_ends_with_its_reference(write: Write):
    turns = [
        user("audio", "a.wav"),
        {"role": "assistant", "message_type": "audio-text", "content": ["b.wav", "At ten."]},
        user("text", "And"),
        user("audio-text", ["c.wav", "back?"]),
        {"role": "assistant", "message_type": "text", "content": "At noon."},
    ]
    row = {"task_type": "understanding", "conversation": turns, "metric": "match"}
    (item,) = read_manifest(write(row), ENGLISH).items
    assert item.reference == "At noon."
    assert item.question == "And\nback?"
    assert item.recordings == {0: "/sounds/a.wav", 1: "/sounds/b.wav", 3: "/sounds/c.wav"}
    assert item.messages[1]["content"] == ["/sounds/b.wav", "At ten."]
    assert len(item.messages) == 4


def test_csv_rows(tmp_path: Path):
    path = tmp_path / "set.csv"
    path.write_text(
        "file_name,sentence,question,choices,start,end\n"
        'a.wav,"hello, you",,,1.5,2\n'
        "b.wav,cat,What is it?,dog|cat,,\n"
    )
    first, second = read_manifest(path, ENGLISH).items
    assert (first.metric, first.reference, first.span) == ("wer", "hello, you", (1.5, 2.0))
    assert (second.metric, second.choices, second.span) == ("accuracy", ("dog", "cat"), None)


def test_tsv_rows(tmp_path: Path):
    path = tmp_path / "set.tsv"
    path.write_text('path\tsentence\na.wav\the said "no"\n')
    assert read_manifest(path, ENGLISH).items[0].reference == 'he said "no"'


def test_defaults_are_for_rows_that_do_not_say(write: Write):
    rows = [
        {"audio": "a.wav", "text": "x"},
        {"audio": "a.wav", "text": "y", "language": "fr", "metric": "cer", "question": "Quoi?"},
    ]
    defaults = Defaults(Path("/"), metric="wer", language="de", question="Was?")
    first, second = read_manifest(write(*rows), defaults).items
    assert (first.metric, first.language, first.question) == ("wer", "de", "Was?")
    assert (second.metric, second.language, second.question) == ("cer", "fr", "Quoi?")


BAD = {
    "expected a JSON object": "words",
    "audio: missing": {"text": "x"},
    "audio: expected text, found ['a']": {"audio": ["a"], "text": "x"},
    "reference: missing or empty": {"audio": "a.wav", "text": "  "},
    "reference: 'horse' is none of the choices": {
        "audio": "a.wav",
        "text": "horse",
        "choices": ["dog", "cat"],
    },
    "choices: expected a list of texts": {"audio": "a.wav", "text": "dog", "choices": [1]},
    "choices: expected at least two": {"audio": "a.wav", "text": "dog", "metric": "accuracy"},
    "metric: expected 'wer', 'cer'": {"audio": "a.wav", "text": "x", "metric": "bleu"},
    "metric: a question and its answer": {"audio": "a.wav", "text": "x", "question": "Why?"},
    "language: expected the code": {"audio": "a.wav", "text": "x", "language": "English"},
    "start, end: expected both": {"audio": "a.wav", "text": "x", "start": 1},
    "start, end: expected a start before the end, found 2 and 1": {
        "audio": "a.wav",
        "text": "x",
        "start": 2,
        "end": 1,
    },
    "end: expected a valid number": {"audio": "a.wav", "text": "x", "start": 0, "end": "late"},
    "id: 'twice' was used by an earlier line": {"audio": "a.wav", "text": "x", "id": "twice"},
    "task_type: expected a name": {"conversation": []},
    "conversation: the last message must be": {
        "task_type": "understanding",
        "conversation": [user("text", "x")],
    },
    "conversation: there is no question": {
        "task_type": "understanding",
        "conversation": [{"role": "assistant", "message_type": "text", "content": "x"}],
    },
}


@pytest.mark.parametrize("problem", BAD)
def test_bad_lines_are_left_out_and_named(write: Write, problem: str):
    path = write({"audio": "a.wav", "text": "x", "id": "twice"}, BAD[problem])
    manifest = read_manifest(path, ENGLISH)
    assert len(manifest.items) == 1
    (fault,) = manifest.faults
    assert fault.startswith(f"{path}:2: {problem}")


def test_all_faults_of_a_line_are_named(write: Write):
    wrong = {"audio": ["a"], "text": "x", "metric": "bleu", "start": -1, "end": 2}
    late = {"audio": "a.wav", "metric": "wer", "language": None}
    good = {"audio": "a.wav", "text": "x", "language": "en"}
    first, second = read_manifest(write(good, wrong, late), Defaults(Path("/"))).faults
    assert all(f"{field}: expected" in first for field in ("audio", "metric", "start"))
    assert all(f"{field}: missing" in second for field in ("reference", "language"))


def test_error_rates_need_a_language(write: Write):
    with pytest.raises(DataError, match=r"set.jsonl:1: language: missing"):
        read_manifest(write({"audio": "a.wav", "text": "x"}), Defaults(Path("/")))


def test_broken_json_is_a_bad_line(tmp_path: Path):
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps({"audio": "a.wav", "text": "x"}) + '\n\n{"audio": \n')
    manifest = read_manifest(path, ENGLISH)
    (fault,) = manifest.faults
    assert fault.startswith(f"{path}:3: not valid JSON")


@pytest.mark.parametrize("name", ["set.txt", "missing.jsonl"])
def test_files_that_cannot_be_read_are_named(tmp_path: Path, name: str):
    with pytest.raises(DataError, match=name):
        read_manifest(tmp_path / name, ENGLISH)


def test_empty_manifest(write: Write):
    with pytest.raises(DataError, match="no lines"):
        read_manifest(write(), ENGLISH)


def test_language_codes():
    assert parse_language("en_US") == "en"
    assert parse_language(" ZH ") == "zh"
    with pytest.raises(DataError, match="found 'x'"):
        parse_language("x")
