"""Conversations: what is read and written, and what is refused with file, line and field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kimia_infer.data.conversations import ConversationFile, DataError
from kimia_infer.utils.files import write_json_lines
from tests.conversations import ANSWER, line, spoken, user

GOOD = [
    line(user(), spoken(audio_tokens=[7, 8]), ANSWER),
    line(spoken(), {**ANSWER, "message_type": "audio-text", "content": ["b.wav", "ü"]},
         task_type="chat"),
]  # fmt: skip
BAD = {
    "no object": ([], "expected an object"),
    "no task": (line(user(), ANSWER, task_type=None), "task_type: expected a name"),
    "no messages": (line(), "conversation: expected a list"),
    "role": (line(user(role="robot"), ANSWER), "conversation[0].role: expected 'user'"),
    "system": (line(user(role="system"), ANSWER), "no system role"),
    "type": (line(user(message_type="video"), ANSWER), "conversation[0].message_type"),
    "no type": (line({"role": "user", "content": "a"}, ANSWER), "message_type: missing"),
    "empty text": (line(user(content=" "), ANSWER), "conversation[0].content: the text is empty"),
    "empty answer": (line(user(), {**ANSWER, "content": ""}), "conversation[1].content: the text"),
    "text": (line(user(content=3), ANSWER), "conversation[0].content: expected text"),
    "failed codes": (line(spoken(audio_tokens=[]), ANSWER), "conversation[0].audio_tokens: empty"),
    "half a code": (line(spoken(audio_tokens=[1.5]), ANSWER), "audio_tokens: expected a list of"),
    "codes of text": (line(user(audio_tokens=[7]), ANSWER), "only messages of type 'audio'"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(name: str, tmp_path: Path):
    values, message = BAD[name]
    path = tmp_path / "train.jsonl"
    path.write_text("\n" + json.dumps(GOOD[0]) + "\n" + json.dumps(values) + "\n")
    file = ConversationFile(path)
    assert file[0].audio_ids == {1: [7, 8]}
    with pytest.raises(DataError) as caught:
        file[1]
    assert str(caught.value).startswith(f"{path}:3: ")
    assert message in str(caught.value)


def test_a_line_that_is_no_json(tmp_path: Path):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(GOOD[0]) + "\n{oops\n")
    with pytest.raises(DataError, match=r"train.jsonl:2: not valid JSON"):
        ConversationFile(path)[1]


def test_a_file_without_lines(tmp_path: Path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="no lines"):
        ConversationFile(tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        ConversationFile(tmp_path / "none.jsonl")


def test_lines_are_read_as_they_were_written(tmp_path: Path):
    path = tmp_path / "train.jsonl"
    assert write_json_lines(path, GOOD) == len(GOOD)
    file = ConversationFile(path)
    assert [file.raw(index) for index in range(len(file))] == GOOD
    assert [conversation.output_type for conversation in file] == [
        "text" if raw["task_type"] == "understanding" else "both" for raw in GOOD
    ]
    assert list(tmp_path.iterdir()) == [path]
