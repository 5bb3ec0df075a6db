"""The whole small world: right answers, splits, words; questions that it has no answer to."""

from __future__ import annotations

import random

import pytest

from scripts.miniature.world import core, unknown, whole
from scripts.miniature.world.numbers import HUNDRED, number
from scripts.miniature.world.splits import SPLITS, split_of, split_of_dialogue

VALUES = {number(n): n for n in range(HUNDRED + 1)}


def test_numbers_have_one_name_each():
    assert len(VALUES) == HUNDRED + 1
    assert (number(0), number(12), number(19)) == ("zero", "twelve", "nineteen")
    assert (number(20), number(47), number(100)) == ("twenty", "forty seven", "one hundred")


@pytest.mark.parametrize("split", SPLITS)
def test_sums_differences_and_products_are_right(split: str):
    signs = {"plus": int.__add__, "minus": int.__sub__, "times": int.__mul__}
    for kind in ("sum", "large_sum", "difference", "product"):
        for turn in whole.questions(split)[kind]:
            words = turn.user.removeprefix("what is ").removeprefix("how much is ")
            for sign, work in signs.items():
                left, found, right = words.removeprefix("tell me ").partition(f" {sign} ")
                if found:
                    assert VALUES[turn.answer] == work(VALUES[left], VALUES[right]), turn


def test_every_question_has_one_answer_and_its_split():
    answers: dict[str, str] = {}
    for split in SPLITS:
        kinds = whole.questions(split)
        assert kinds.keys() == whole.QUESTIONS.keys() and all(kinds.values())
        for kind, turns in kinds.items():
            for turn in turns:
                assert answers.setdefault(turn.user, turn.answer) == turn.answer, turn
                assert kind in whole.FIXED or split_of(turn.user) == split
    assert whole.QUESTIONS.keys() == whole.questions("train").keys()
    assert all(share > 0 for share in whole.QUESTIONS.values())
    assert sum(whole.KINDS.values()) == pytest.approx(1.0)
    assert answers["which number comes after ninety nine"] == "one hundred"
    assert answers["what comes after sunday"] == "monday"
    assert answers["tell me the season in january"] == "winter"
    assert answers["spell cup"] == "c u p" and answers["is a dog an animal"] == "yes"


def test_the_core_is_part_of_the_whole():
    for split in SPLITS:
        asked = {turn for turns in whole.questions(split).values() for turn in turns}
        assert {turn for turns in core.questions(split).values() for turn in turns} <= asked
    assert set(core.vocabulary()) < set(whole.vocabulary())


def test_the_vocabulary_covers_what_is_said():
    words, chance = set(whole.vocabulary()), random.Random(7)
    assert 400 <= len(words) <= 450
    for split in SPLITS:
        for _ in range(300):
            turns = whole.dialogue(chance, split)
            assert split_of_dialogue(turns) == split
            texts = [whole.sentence(chance, split), unknown.ANSWER]
            texts += [text for turn in turns for text in (turn.user, turn.answer)]
            assert {word for text in texts for word in text.split()} <= words


def test_unknown_questions_have_words_that_the_world_lacks():
    words, chance = set(whole.vocabulary()), random.Random(8)
    asked = {
        split: {unknown.unknown(chance, split).user for _ in range(2000)}
        for split in ("train", "held_out")
    }
    assert all(set(text.split()) - words for texts in asked.values() for text in texts)
    assert not asked["train"] & asked["held_out"] and len(asked["train"]) > 500
    assert not set(unknown.TEMPLATES) & set(unknown.HELD_OUT_TEMPLATES)
    for slot, held_out in unknown.HELD_OUT_WORDS.items():
        assert not set(held_out) & set(unknown.WORDS[slot])
