"""Texts are compared in the form that is standard for their language."""

from __future__ import annotations

import pytest

from kimia_infer.evaluation.normalization import normalize, normalize_characters


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
