"""Training data: what is read and written, and what is refused with file, line and field."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from kimia_infer.data.conversations import (
    ConversationFile,
    DataError,
    parse_conversation,
)
from kimia_infer.training.dataset import check_lines
from kimia_infer.training.tasks.finetune import LazySpeechCodes
from kimia_infer.utils.files import write_json_lines
from tests.paths import GOLDEN
from tests.training import recorded
from tests.training.recorded import CONFIG, SAMPLES

GOOD = [record["raw"] for record in SAMPLES]
SOUND = next(
    message["content"]
    for line in GOOD
    for message in line["conversation"]
    if message["message_type"] == "audio"
)


def user(**changes) -> dict:
    return {"role": "user", "message_type": "text", "content": "hello", **changes}


def spoken(**changes) -> dict:
    return user(**{"message_type": "audio", "content": SOUND, **changes})


ANSWER = {"role": "assistant", "message_type": "text", "content": "fine"}


def line(*messages: dict, **changes) -> dict:
    return {"task_type": "understanding", "conversation": list(messages), **changes}


LIMIT = len(recorded.sample(SAMPLES[0])) + 20
FIRST, END = CONFIG.token_offset, CONFIG.vocab_size
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
    "no file": (
        line(spoken(content="nowhere.wav", audio_tokens=[FIRST]), ANSWER),
        "conversation[0].content: ",
    ),
    "no codes": (line(spoken(), ANSWER), "conversation[0].audio_tokens: missing"),
    "failed codes": (line(spoken(audio_tokens=[]), ANSWER), "conversation[0].audio_tokens: empty"),
    "low code": (
        line(spoken(audio_tokens=[FIRST - 1]), ANSWER),
        f"conversation[0].audio_tokens: {FIRST - 1} is not the id of a speech code",
    ),
    "high code": (line(spoken(audio_tokens=[END]), ANSWER), f"{END} is not the id"),
    "half a code": (line(spoken(audio_tokens=[1.5]), ANSWER), "audio_tokens: expected a list of"),
    "codes of text": (line(user(audio_tokens=[FIRST]), ANSWER), "only messages of type 'audio'"),
    "nothing learned": (line(user()), "nothing in it is learned"),
    "too long": (line(user(content="x" * LIMIT), ANSWER), f"more than max_length {LIMIT}"),
    "long text beside speech": (
        line(
            user(),
            ANSWER,
            {
                "role": "assistant",
                "message_type": "audio-text",
                "content": [SOUND, "x" * (CONFIG.audio_delay + 2)],
                "audio_tokens": [FIRST],
            },
        ),
        "conversation[2].content: ",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(name: str, tmp_path: Path):
    values, message = BAD[name]
    path = tmp_path / "train.jsonl"
    path.write_text("\n" + json.dumps(GOOD[0]) + "\n" + json.dumps(values) + "\n")
    file, builder = ConversationFile(path), recorded.builder(max_length=LIMIT)
    with pytest.raises(DataError) as caught:
        check_lines(file, builder, range(len(file)), skip=False)
    assert f"{path}:3: " in str(caught.value)
    assert message in str(caught.value)
    samples, faults = check_lines(file, builder, range(len(file)), skip=True)
    assert len(samples) == 1
    assert len(faults) == 1


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


def test_codes_that_do_not_fit_the_sound():
    raw = copy.deepcopy(GOOD[0])
    message = next(m for m in raw["conversation"] if m["message_type"] == "audio")
    message["audio_tokens"].append(FIRST)
    with pytest.raises(DataError, match="the sound gives"):
        recorded.sample({"raw": raw})


def test_missing_codes_are_computed():
    recorded_codes = json.loads((GOLDEN / "glm4" / "codes.json").read_text())
    expected = [FIRST + code for code in recorded_codes[Path(SOUND).stem]["codes"]]
    builder = recorded.builder(encode_speech=LazySpeechCodes(GOLDEN / "glm4"))
    conversation = parse_conversation(line(spoken(), ANSWER))
    sample = builder.build(conversation)
    assert sample.audio_ids[sample.is_continuous].tolist() == expected
    assert len(builder.check(conversation)) == len(sample)
