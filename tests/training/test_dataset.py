"""Lines that become samples, and those that are refused with file, line and field."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from kimia_infer.data.conversations import ConversationFile, DataError, parse_conversation
from kimia_infer.training.dataset import check_lines
from kimia_infer.training.samples import LazySpeechCodes
from tests import conversations
from tests.conversations import ANSWER, line, user
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
LIMIT = len(recorded.sample(SAMPLES[0])) + 20
FIRST, END = CONFIG.token_offset, CONFIG.vocab_size


def spoken(**changes: object) -> dict:
    return conversations.spoken(**{"content": SOUND, **changes})


BAD = {
    "no file": (
        line(spoken(content="nowhere.wav", audio_tokens=[FIRST]), ANSWER),
        "conversation[0].content: ",
    ),
    "low code": (
        line(spoken(audio_tokens=[FIRST - 1]), ANSWER),
        f"conversation[0].audio_tokens: {FIRST - 1} is not the id of a speech code",
    ),
    "high code": (line(spoken(audio_tokens=[END]), ANSWER), f"{END} is not the id"),
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
def test_what_is_refused(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    values, message = BAD[name]
    path = tmp_path / "train.jsonl"
    path.write_text("\n" + json.dumps(GOOD[0]) + "\n" + json.dumps(values) + "\n")
    file, builder = ConversationFile(path), recorded.builder(max_length=LIMIT)
    with pytest.raises(DataError) as caught:
        check_lines(file, builder, skip=False)
    assert f"{path}:3: " in str(caught.value)
    assert message in str(caught.value)
    assert len(check_lines(file, builder, skip=True)) == 1
    (record,) = caplog.records
    assert record.getMessage().startswith(f"skipped: {path}:3: ")


def test_codes_that_do_not_fit_the_sound():
    raw = copy.deepcopy(GOOD[0])
    message = next(m for m in raw["conversation"] if m["message_type"] == "audio")
    message["audio_tokens"].append(FIRST)
    with pytest.raises(DataError, match="the audio gives"):
        recorded.sample({"raw": raw})


def test_missing_codes_are_computed():
    recorded_codes = json.loads((GOLDEN / "glm4" / "codes.json").read_text())
    expected = [FIRST + code for code in recorded_codes[Path(SOUND).stem]["codes"]]
    builder = recorded.builder(encode_speech=LazySpeechCodes(GOLDEN / "glm4"))
    conversation = parse_conversation(line(spoken(), ANSWER))
    sample = builder.build(conversation)
    assert sample.audio_ids[sample.is_continuous].tolist() == expected
    assert len(builder.check(conversation)) == len(sample)
