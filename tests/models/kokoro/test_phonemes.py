"""Texts to phonemes: what is read, what is cut, what is refused."""

from __future__ import annotations

import subprocess

import pytest

from kimia_infer.models.kokoro.phonemes.alignment import aligned
from kimia_infer.models.kokoro.phonemes.espeak import rewritten
from kimia_infer.models.kokoro.phonemes.normalize import clean, normalize
from kimia_infer.models.kokoro.phonemes.reading import Sentence, read_phonemes, read_text
from kimia_infer.utils.errors import RequestError
from tests.models.kokoro.recorded import SYMBOLS

VOCAB = {symbol: place for place, symbol in enumerate(SYMBOLS, 1)}
LONGEST = 510


def read(text: str, language: str = "en-us", **options: object) -> list[Sentence]:
    return list(read_text(text, language, VOCAB, LONGEST, **options))  # type: ignore[arg-type]


def test_english() -> None:
    [sentence] = read("The quick brown fox jumps over the lazy dog.")
    assert sentence.phonemes == "ðə kwˈɪk bɹˈWn fˈɑks ʤˈʌmps ˌOvəɹ ðə lˈAzi dˈɑɡ."
    spoken = {w.text: sentence.phonemes[w.start : w.end] for w in sentence.words}
    assert spoken["brown"] == "bɹˈWn" and spoken["dog"] == "dˈɑɡ" and len(sentence.words) == 9


@pytest.mark.parametrize(
    ("language", "text", "phonemes"),
    [
        ("en-gb", "Where are you?", "wˈɛːɹ ɑː juː?"),
        ("es", "Hola, ¿cómo estás?", "ˈola, kˈomo estˈas?"),
        ("fr-fr", "C'est l'été.", "sɛ letˈe."),
        ("hi", "नमस्ते।", "nəmˈʌsteː."),
        ("it", "Ciao!", "ʧˈao!"),
        ("pt-br", "Olá.", "olˈa."),
    ],
)
def test_other_languages(language: str, text: str, phonemes: str) -> None:
    assert [each.phonemes for each in read(text, language)] == [phonemes]


@pytest.mark.parametrize(
    ("ipa", "language", "phonemes"),
    [
        ("d͡ʒˈʌd͡ʒ t͡ʃˈɜːt͡ʃ", "en-us", "ʤˈʌʤ ʧˈɜɹʧ"),
        ("bˈʌʔn̩ bˈɑːɾəl", "en-us", "bˈʌtn bˈɑTəl"),
        ("fˈe͡əɹi nˈiəli ɡˈo͡ʊt", "en-gb", "fˈɛːɹi nˈɪəli ɡˈOt"),
        ("(fr)bɔ̃ʒˈuʁ(en)", "fr-fr", "bɔ̃ʒˈuʁ"),
        ("(\u200dk\u200do)ˈɐnnjʌŋ(\u200de\u200dn-\u200du\u200ds)", "en-us", "ˈənnjʌŋ"),
    ],
)
def test_rewriting(ipa: str, language: str, phonemes: str) -> None:
    assert rewritten(ipa, language) == phonemes


@pytest.mark.parametrize(
    ("text", "read_as"),
    [
        ("$5.50 and £1", "5 dollars and 50 cents and 1 pound"),
        ("$3.2 million, €0.05", "3.2 million dollars, 5 cents"),
        ("3:30 pm, 12:05, 9:00, 18:00", "3 30 p m, 12 oh 5, 9 o'clock, 18 hundred"),
        ("2024-11-29 or 1/2/2024", "November 29, 20 24 or January 2, 20 24"),
        ("in 1985, 2003, 1905", "in 19 85, 2003, 19 oh 5"),
        ("the 1990s and 80s", "the 19 nineties and eighties"),
        ("1,234,567 is 3/4", "1234567 is three quarters"),
        ("-5 to 3-4 & more", "minus 5 to 3 to 4 and more"),
        ("Dr. Who vs. St. John", "Doctor Who versus Saint John"),
        ("No. 7, etc. No. Then", "number 7, et cetera. No. Then"),
        ("99/99/2024", "99/99/20 24"),
    ],
)
def test_figures_become_words(text: str, read_as: str) -> None:
    assert normalize(text, "en-us") == read_as


def test_addresses_are_spelled() -> None:
    assert normalize("see www.a-b.com/x", "en-us").split() == (
        ["see", "w", "w", "w", "dot", "a", "dash", "b", "dot", "com", "slash", "x"]
    )
    assert normalize("me@example.org", "fr-fr").split() == ["me", "at", "example", "dot", "org"]
    assert normalize("20 € ou €20", "fr-fr") == "20 € ou 20 €"


def test_what_nobody_speaks_is_left_out() -> None:
    text = "😀 Hi <break time='1s'/> «you»\x07，ok‘s…"
    assert clean(text).split() == ["Hi", "“you”", ",ok's…"]
    assert clean("\x1b[31mred\x1b[0m Ｆ𝓗ﬁⅫ ①② १٢").split() == ["red", "FHfiXII", "1", "2", "12"]


def test_overrides_and_lexicon() -> None:
    [sentence] = read("Say [Kokoro](/kˈOkəɹO/), loudly.")
    assert "kˈOkəɹO, " in sentence.phonemes
    assert ("Kokoro", "kˈOkəɹO") in [
        (w.text, sentence.phonemes[w.start : w.end]) for w in sentence.words
    ]
    [sentence] = read("The KIMI model.", lexicon={"kimi": "kˈimi"})
    assert sentence.phonemes.split()[1] == "kˈimi"
    with pytest.raises(RequestError, match=r"text: 'Ж' in 'Ж'"):
        read("[x](/Ж/)")


def test_long_texts_are_cut() -> None:
    sentences = read("This is a sentence of some length. " * 40)
    assert len(sentences) == 40
    [*most, _] = read("and so on " * 400)
    assert all(len(each.phonemes) <= LONGEST for each in most)
    assert len(most[0].phonemes) > LONGEST - 20
    long = "well and truly over the hills and far away from everything we know, " * 3
    assert len(read(long)[0].phonemes) < 0.5 * len(read(long)[1].phonemes)


def test_short_sentences_are_joined() -> None:
    first, second = read("This is how it begins, right here. No. Yes. And so on and on it goes.")
    assert first.phonemes.endswith("hˈɪɹ.") and second.phonemes.count(".") == 3
    assert [word.text for word in second.words][:2] == ["No", "Yes"]
    word = second.words[-1]
    assert second.phonemes[word.start : word.end] == "ɡˈOz"


def test_plain_phonemes() -> None:
    sentences = list(read_phonemes("həlˈO wˈɜɹld! hˌW ɑɹ ju tədˈA?", VOCAB, LONGEST))
    assert [each.phonemes for each in sentences] == ["həlˈO wˈɜɹld!", "hˌW ɑɹ ju tədˈA?"]
    assert [word.text for word in sentences[0].words] == ["həlˈO", "wˈɜɹld!"]
    with pytest.raises(RequestError, match=r"phonemes: 'é'"):
        list(read_phonemes("é", VOCAB, LONGEST))
    with pytest.raises(RequestError, match=r"phonemes: expected some"):
        list(read_phonemes("?!", VOCAB, LONGEST))


@pytest.mark.parametrize(
    "text", ["", " \n ", "?!… —", "😀🎉", "\x00\x07", "<speak></speak>", "[x](/ˈˌ/)"]
)
def test_nothing_to_speak(text: str) -> None:
    with pytest.raises(RequestError, match="text: nothing in it can be spoken"):
        read(text)


def test_limits() -> None:
    with pytest.raises(RequestError, match="text: at most 100000 characters"):
        read("a" * 100_001)
    with pytest.raises(RequestError, match=r"language: expected one of en-us, .*found 'ko'"):
        read("annyeong", "ko")


def test_a_row_of_letters_with_dots() -> None:
    assert [each.phonemes[:8] for each in read("b." * 120)] == ["bˈi bˈi "]


def test_espeak_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RequestError, match="espeak-ng is not installed"):
        read("Hello.")


def test_twenty_thousand_characters_are_few_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: calls.append(a) or run(*a, **k))
    sentences = read("The quick brown fox jumps over the dog. " * 500)
    assert len(sentences) == 500 and len(calls) <= 33


def test_alignment() -> None:
    assert aligned(["end", "of", "the", "day"], ["ˈɛnd", "ʌvðə", "dˈA"]) == [
        ("end", "ˈɛnd"),
        ("of the", "ʌvðə"),
        ("day", "dˈA"),
    ]
    assert aligned(["in", "85", "ok"], ["ɪn", "ˈATi", "fˈIv", "ˌOkˈA"])[1] == ("85", "ˈATi fˈIv")
    assert aligned(["a"], []) == []
