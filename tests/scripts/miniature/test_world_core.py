"""The core of the small world: its texts are right, disjoint, and within its words."""

from __future__ import annotations

import random

import pytest

from scripts.miniature.world.core import (
    COLOR_OF,
    NUMBERS,
    dialogue,
    question,
    questions,
    sentence,
    vocabulary,
)
from scripts.miniature.world.splits import SPLITS, split_of, split_of_dialogue

VALUES = {word: value for value, word in enumerate(NUMBERS)}


def solve(text: str) -> str:
    """The answer to a question, worked out from its last words."""
    words = text.split()
    if words[0] == "count" or words[1] == "count":
        first = VALUES[words[words.index("from") + 1]] if "from" in words else 1
        return " ".join(NUMBERS[first : VALUES[words[-1]] + 1])
    if "color" in words:
        return COLOR_OF[words[-1]]
    *_, left, sign, right = words
    if sign in ("after", "before"):
        return NUMBERS[VALUES[right] + (1 if sign == "after" else -1)]
    value = {"plus": 1, "minus": -1}[sign] * VALUES[right]
    return NUMBERS[VALUES[left] + value]


@pytest.mark.parametrize("split", SPLITS)
def test_every_question_has_the_right_answer(split: str):
    turns = [turn for kind in questions(split).values() for turn in kind]
    assert len(turns) > 50
    for turn in turns:
        assert turn.answer == solve(turn.user), turn
        assert split_of(turn.user) == split


def test_splits_share_no_text():
    chance = random.Random(3)
    drawn = {split: {sentence(chance, split) for _ in range(300)} for split in SPLITS}
    asked = {split: {t.user for k in questions(split).values() for t in k} for split in SPLITS}
    talks = {split: {dialogue(chance, split) for _ in range(300)} for split in SPLITS}
    for texts in (drawn, asked, talks):
        assert not texts["train"] & texts["validation"]
        assert not texts["train"] & texts["held_out"]
        assert not texts["validation"] & texts["held_out"]
    assert all(split_of_dialogue(turns) == split for split in SPLITS for turns in talks[split])
    alone = {split: drawn[split] | asked[split] for split in SPLITS}
    for split in SPLITS:
        said = {turn.user for turns in talks[split] for turn in turns}
        for other in {"validation", "held_out"} - {split}:
            assert not said & alone[other]


def test_sentences_are_short_and_various():
    chance = random.Random(4)
    texts = {sentence(chance, "train") for _ in range(2000)}
    assert len(texts) > 900
    assert {len(text.split()) for text in texts} == {4, 5, 6, 7}


def test_the_last_question_of_a_dialogue_needs_the_others():
    """The same last question has different answers, by what was said before."""
    chance = random.Random(5)
    answers: dict[str, set[str]] = {}
    for _ in range(3000):
        *_, last = dialogue(chance, "train")
        answers.setdefault(last.user, set()).add(last.answer)
    assert len(answers) > 30
    assert all(len(found) > 1 for found in answers.values())


def test_dialogues_say_what_was_said():
    chance = random.Random(6)
    for _ in range(500):
        *before, last = dialogue(chance, "train")
        words = last.user.split()
        if "color" in words:
            _, item, _, color = before[0].user.split()
            assert words[-1] == item and last.answer == color
            assert all(turn.answer == solve(turn.user) for turn in before[1:])
        elif "where" in words:
            assert before[0].user.split()[0] in words
            assert last.answer.split()[-1] == before[0].user.split()[-1]
        else:
            first = VALUES[before[0].answer]
            assert before[0].answer == solve(before[0].user)
            step = 1 if last.user == "and then" else VALUES[words[1]]
            assert VALUES[last.answer] == first - step * (-1) ** ("less" not in words)


def test_the_vocabulary_covers_what_is_said():
    words, chance = set(vocabulary()), random.Random(7)
    assert len(words) == 84
    for split in SPLITS:
        for _ in range(500):
            texts = [sentence(chance, split)]
            for turn in (question(chance, split), *dialogue(chance, split)):
                texts += [turn.user, turn.answer]
            assert {word for text in texts for word in text.split()} <= words
