"""Texts are compared in the standard form of their language; scores are as worked out by hand."""

from __future__ import annotations

import pytest

from kimia_infer.evaluation.items import Item
from kimia_infer.evaluation.score import Errors, score, summarize
from kimia_infer.evaluation.texts import chosen, index_of, normalize, normalize_characters

LETTERED = "What is it?\n(A) dog (B) cat (C) cat flap (D) none of them"
ANIMALS = ("dog", "cat", "cat flap", "none of them")


def item(metric: str, reference: str, language: str | None = "en", **more) -> Item:
    question = {"role": "user", "message_type": "text", "content": more.pop("question", "?")}
    return Item("set", "", "1", metric, [question], reference, language, **more)


def counts(errors: Errors) -> tuple[int, int, int, int]:
    return errors.substitutions, errors.deletions, errors.insertions, errors.reference_length


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("HE HOPED THERE WOULD BE STEW", "he hoped there would be stew"),
        ("He hoped, there would be stew!", "he hoped there would be stew"),
        ("I can't; it's Mr. Smith's.", "i can not it is mister smith is"),
        ("the colour of twenty-one harbours", "the color of 21 harbors"),
        ("um, it cost $20 million", "it cost $20000000"),
        ("[laughter] well (coughs) yes", "well yes"),
        ("<|im_kimia_text_blank|>yes", "yes"),
    ],
)
def test_english_is_unified(text: str, expected: str):
    assert normalize(text, "en") == expected


def test_other_languages_keep_spellings_numbers_and_marks():
    assert normalize("L'été, c'est 21 €!", "fr") == "l été c est 21"
    assert normalize("twenty-one colours", "de") == "twenty one colours"
    # Vowel signs are marks, without which these would be other words.
    assert normalize("नमस्ते, दुनिया!", "hi") == "नमस्ते दुनिया"


def test_characters_are_counted_without_spaces_and_width():
    assert normalize_characters("你好， 世界！ＡＢＣ１２ abc", "zh") == "你好世界abc12abc"
    assert normalize_characters("二十一 ２１", "zh") == "二十一21"
    assert normalize_characters("「こんにちは」、 世界。", "ja") == "こんにちは世界"
    assert normalize_characters("ｶﾞｷﾞ", "ja") == "ガギ"


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        ("the cat sat on the mat", "the cat sat on the mat", (0, 0, 0, 6)),
        ("THE CAT SAT ON THE MAT", "The cat, sat on the mat.", (0, 0, 0, 6)),
        ("the cat sat on the mat", "the bat sat the mat now", (1, 1, 1, 6)),
        ("the cat", "", (0, 2, 0, 2)),
        ("[noise]", "hello there", (0, 0, 2, 0)),  # nothing is left to be said
        ("uh", "", (0, 0, 0, 0)),
    ],
)
def test_word_errors(reference: str, answer: str, expected: tuple):
    assert counts(score(item("wer", reference), answer)) == expected


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        ("今天 天气 很好", "今天，天气很好。", (0, 0, 0, 6)),
        ("今天天气很好", "今天汽很好啊", (1, 1, 1, 6)),
        ("我有21个", "我有二十一个", (2, 0, 1, 5)),  # numbers count as they are written
    ],
)
def test_character_errors(reference: str, answer: str, expected: tuple):
    assert counts(score(item("cer", reference, "zh"), answer)) == expected


def test_error_rates_are_those_of_all_references_together():
    answers = [("a b c d", "a b c d"), ("e", "f g")]
    scores = [score(item("wer", reference, "de"), answer) for reference, answer in answers]
    assert summarize("wer", scores) == {
        "score": 40.0,  # 2 errors in 5 words, although the rates are 0 and 200 %
        "substitutions": 1,
        "deletions": 0,
        "insertions": 1,
        "reference_length": 5,
    }


def test_no_reference_words_have_no_rate():
    assert summarize("wer", [score(item("wer", "uh"), "yes")])["score"] is None
    assert summarize("accuracy", [])["score"] is None


@pytest.mark.parametrize(
    ("answer", "choice"),
    [
        ("B", 1),
        (" b. ", 1),
        ("（Ｂ）", 1),
        ("(B) cat", 1),
        ("B. It says miaow.", 1),
        ("B) cat", 1),
        ("The answer is B", 1),
        ("The correct option is: **B**, a cat.", 1),
        ("Answer: (A)", 0),
        ("答案是B。", 1),
        ("我选择B", 1),
        ("(A) or (B)", None),
        ("E", None),
        ("A. Sneeze, although it is a cat", 0),  # the letter comes before the text
        ("It is a cat.", 1),
        ("A cat flap!", 2),  # not also "cat"
        ("A dog, not a cat", None),
        ("none of them", 3),
        ("category", None),
        ("", None),
    ],
)
def test_choice_rule(answer: str, choice: int | None):
    assert chosen(answer, ANIMALS, LETTERED, "en") == choice


def test_letters_count_only_where_they_are_shown():
    assert chosen("A", ("yes", "no"), "Is it raining?", "en") is None
    assert chosen("Answer: No", ("yes", "no"), "Is it raining?", "en") == 1
    assert chosen("No, there is no rain; the answer is yes", ("yes", "no"), "?", "en") is None


def test_choices_of_languages_without_spaces():
    assert chosen("这是一只猫。", ("狗", "猫"), "这是什么？", "zh") == 1


@pytest.mark.parametrize("reference", ["cat", "Cat.", "B", "(b)"])
def test_reference_is_the_text_or_letter_of_a_choice(reference: str):
    assert index_of(reference, ANIMALS, LETTERED, "en") == 1


@pytest.mark.parametrize(
    ("reference", "question"), [("horse", LETTERED), ("E", LETTERED), ("B", "What is it?")]
)
def test_reference_that_is_no_choice_is_refused(reference: str, question: str):
    with pytest.raises(ValueError, match="none of the choices"):
        index_of(reference, ANIMALS, question, "en")


def test_accuracy_counts_what_is_right_and_what_names_nothing():
    asked = item("accuracy", "cat", choices=ANIMALS, question=LETTERED)
    verdicts = [score(asked, answer) for answer in ("B", "dog", "who knows", "cat")]
    assert [verdict.choice for verdict in verdicts] == ["cat", "dog", None, "cat"]
    expected = {"score": 50.0, "correct": 2, "unrecognized": 1}
    assert summarize("accuracy", verdicts) == expected


@pytest.mark.parametrize(
    ("reference", "answer", "right"),
    [
        ("eleven", "I hear 11 splashes.", True),
        ("WATER", "It is water", True),
        ("water", "It is a waterfall", False),
        ("train", "A car", False),
    ],
)
def test_match_looks_for_whole_words(reference: str, answer: str, right: bool):
    assert score(item("match", reference), answer).correct is right


def test_open_questions_have_no_score():
    assert score(item("none", ""), "anything") is None
    assert summarize("none", [None])["score"] is None
