"""Spoken answers are learned as the token loop generates them."""

from __future__ import annotations

import pytest

from kimia_infer.data.conversations import DataError, parse_conversation
from kimia_infer.training.samples import Sample, SampleBuilder
from tests.training import recorded
from tests.training.recorded import CONFIG, SAMPLES, SPECIAL

BLANK, DELAY, FIRST = SPECIAL.text_blank, CONFIG.audio_delay, CONFIG.token_offset
HEARD = next(m for m in SAMPLES[0]["raw"]["conversation"] if m["message_type"] == "audio")
SOUND = HEARD["content"]


def answer(text: str, codes: int) -> dict:
    ids = list(range(FIRST, FIRST + codes))
    content = [SOUND, text]
    return {
        "role": "assistant", "message_type": "audio-text", "content": content, "audio_tokens": ids
    }  # fmt: skip


def build(*messages: dict, learn: bool = True) -> Sample:
    base = recorded.builder()
    builder = SampleBuilder(**{**vars(base), "spoken_answers": learn})
    return builder.build(parse_conversation({"task_type": "chat", "conversation": list(messages)}))


QUESTION = {"role": "user", "message_type": "text", "content": "who?"}
TURNS = [(QUESTION,), (HEARD,), (QUESTION, HEARD), (QUESTION, answer("so", 3), HEARD)]


@pytest.mark.parametrize("turns", TURNS, ids=range(len(TURNS)))
def test_the_answer_is_what_is_generated(turns: tuple[dict, ...]):
    text, codes = "hello", 5
    sample = build(*turns, answer(text, codes))
    ids = list(text.encode())
    steps = DELAY + codes + 1  # of the token loop, of which the last gives the end of the message
    begin = len(sample) - steps - 1  # predicted from the start of the assistant's turn
    audio, texts = sample.audio_labels[begin:-1].tolist(), sample.text_labels[begin:-1].tolist()
    assert sample.audio_ids[begin] == SPECIAL.assistant_msg_start
    assert audio == [BLANK] * DELAY + list(range(FIRST, FIRST + codes)) + [SPECIAL.msg_end]
    assert texts == [*ids, SPECIAL.text_eos, *[BLANK] * (steps - len(ids) - 1)]
    learned = sample.audio_loss_mask[begin:-1].tolist(), sample.text_loss_mask[begin:-1].tolist()
    assert learned[0] == [False] * DELAY + [True] * (codes + 1)
    assert learned[1] == [True] * (len(ids) + 1) + [False] * (steps - len(ids) - 1)


def test_they_are_not_learned_unless_asked_for():
    sample = build(HEARD, answer("hello", 5), learn=False)
    assert not sample.audio_loss_mask.any()
    assert not sample.text_loss_mask.any()
    assert SPECIAL.text_eos not in sample.text_ids


def test_answers_that_cannot_be_learned():
    with pytest.raises(DataError, match=r"conversation\[1\]: a spoken answer has to end its turn"):
        build(QUESTION, answer("a", 3), {**QUESTION, "role": "assistant"})
    full = "x" * (DELAY + 2)
    build(QUESTION, answer(full, 2), learn=False)
    with pytest.raises(DataError, match=r"conversation\[1\].content\[1\]: .* do not fit"):
        build(QUESTION, answer(full, 2))
