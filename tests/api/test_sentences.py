"""Where texts are cut to be spoken, whole ones and growing ones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimia_infer.api.sentences import LONGEST_PIECE, SentenceStream, split_text


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ('He said: "No." And left.', ['He said: "No."', "And left."]),
        ("First line\nsecond line\n\n", ["First line", "second line"]),
        ("Pi is 3.14, e is 2.7.", ["Pi is 3.14, e is 2.7."]),
        ("Mr. Smith met Dr. Who. They left.", ["Mr. Smith met Dr. Who.", "They left."]),
        ("Wait... what?!  Yes", ["Wait...", "what?!", "Yes"]),
        ("你好。今天天气很好！“走吧。”他说", ["你好。", "今天天气很好！", "“走吧。”", "他说"]),
        ("... \n --- \n !!", []),
        ("Dr.", ["Dr."]),
        ("", []),
    ],
)
def test_sentences(text: str, pieces: list[str]) -> None:
    assert split_text(text) == pieces


def test_a_long_sentence_is_cut_at_a_comma_else_between_words() -> None:
    words = "word " * 40
    first, second = split_text(f"{words.strip()}, {words}")
    assert first == f"{words.strip()}," and second == words.strip()
    first, second = split_text(words + words)
    assert len(first) == 249 and f"{first} {second}" == (words + words).strip()
    assert [len(piece) for piece in split_text("字" * 600)] == [250, 250, 100]


@given(st.text(alphabet=st.sampled_from("ab1 .,!?\n字。，\"'")))
def test_nothing_is_lost(text: str) -> None:
    pieces = split_text(text * 3)
    letters = [[c for c in part if c.isalnum()] for part in (text * 3, "".join(pieces))]
    assert letters[0] == letters[1]
    assert all(0 < len(piece) <= LONGEST_PIECE for piece in pieces)
    assert all(any(c.isalnum() for c in piece) for piece in pieces)


@given(st.text(alphabet=st.sampled_from("ab1 .,!?\n字。，\"'D"), max_size=40), st.data())
def test_a_growing_text_has_the_same_pieces(part: str, data: st.DataObject) -> None:
    text = part * data.draw(st.sampled_from([1, 9]))
    stream, rest, pieces = SentenceStream(), text, list[str]()
    while rest:
        size = data.draw(st.integers(1, 60))
        pieces += stream.push(rest[:size])
        rest = rest[size:]
    assert pieces + stream.finish() == split_text(text)


def test_a_sentence_is_known_when_the_next_one_begins() -> None:
    stream = SentenceStream()
    assert stream.push("It is 3.") == []
    assert stream.push("5 metres.") == []
    assert stream.push(" Not more") == ["It is 3.5 metres."]
    assert stream.finish() == ["Not more"]
