"""English, Japanese and Mandarin by misaki: with a stand-in for it, and with itself where it is."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from kimia_infer.api.kokoro import Kokoro
from kimia_infer.models.kokoro.phonemes import misaki
from kimia_infer.models.kokoro.phonemes.reading import Sentence, read_text
from kimia_infer.models.kokoro.phonemes.sources import readable
from kimia_infer.utils.errors import RequestError
from tests.models.kokoro.recorded import SYMBOLS

VOCAB = {symbol: place for place, symbol in enumerate(SYMBOLS, 1)}

STANDINS = {
    "zh": """
class ZHG2P:
    def __call__(self, text):
        return " ".join("x" * len(word) for word in text.split()), None
""",
    "ja": """
class JAG2P:
    def __call__(self, text):
        return "a" * len(text.strip()), None
""",
    "en": """
class Token:
    def __init__(self, text):
        self.text = text


class G2P:
    def __init__(self, british, fallback):
        self.known, self.fallback = {"tomato": "tɑ" if british else "tA"}, fallback

    def __call__(self, text):
        words = (self.known.get(w) or self.fallback(Token(w))[0] for w in text.split())
        return " ".join(words), None
""",
}


def read(text: str, language: str) -> list[Sentence]:
    return list(read_text(text, language, VOCAB, 510, phonemizer="misaki"))


@pytest.fixture(autouse=True)
def _fresh_readers() -> Iterator[None]:
    misaki._reader.cache_clear()
    yield
    misaki._reader.cache_clear()


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules with the names and calls of the real ones."""
    names = {name for names in misaki._PACKAGES.values() for name in names}
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    for name, code in STANDINS.items():
        (tmp_path / "misaki" / f"{name}.py").write_text(code, encoding="utf-8")

    def taken_out() -> dict[str, ModuleType]:
        return {n: sys.modules.pop(n) for n in list(sys.modules) if n.partition(".")[0] in names}

    real = taken_out()
    monkeypatch.syspath_prepend(tmp_path)
    yield
    taken_out()
    sys.modules.update(real)


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


@pytest.mark.usefixtures("absent")
def test_what_is_missing_is_named(tmp_path: Path) -> None:
    for language, extra in (("ja", "kokoro-ja"), ("zh", "kokoro-zh"), ("en-us", "kokoro-en")):
        with pytest.raises(RequestError, match=rf"language: {language} needs misaki, .*{extra}"):
            read("text", language)
    assert [readable(language) for language in ("zh", "en-us", "xx")] == [False, True, False]
    with pytest.raises(RequestError, match=r"kokoro-en.*spacy download en_core_web_sm"):
        Kokoro(tmp_path, phonemizer="misaki")


@pytest.mark.usefixtures("stand_in")
def test_mandarin_is_cut_at_its_marks_and_english_in_it_is_read() -> None:
    text = "今天天气很好，他用iPhone打了一个很长很长很长很长的电话吗？“是的。”她说了很多很多话。"
    first, second = read(text, "zh")
    assert first.phonemes == f"xxxxxx, xx ˈI fˈOn {'x' * 16}?"
    assert first.words[0].text == "今天天气很好"
    assert second.phonemes.startswith("“xx.”") and readable("zh")


@pytest.mark.usefixtures("stand_in")
def test_signs_of_money_become_words() -> None:
    assert read("价格是$20。", "zh")[0].phonemes == "xxxxx xx."
    assert read("50%です。", "ja")[0].phonemes == "aaaaaaaaa."


@pytest.mark.usefixtures("stand_in")
def test_words_that_misaki_does_not_know_are_read_by_espeak() -> None:
    assert read("tomato, please.", "en-us")[0].phonemes == "tA, plˈiz."
    assert read("tomato", "en-gb")[0].phonemes == "tɑ"


def test_the_real_one() -> None:
    for module in ("misaki.ja", "misaki.zh"):
        pytest.importorskip(module, exc_type=ImportError)
    [sentence] = read("今天天气很好。", "zh")
    assert sentence.phonemes == "ʨi→ntʰjɛ→ntʰjɛ→nʨʰi↘ xə↓n xau↓."
    assert read("カーテン、はい。", "ja")[0].phonemes == "kaːteɴ, hai."
    if not misaki.missing("en-us"):
        found = read("I read it yesterday, and we record it.", "en-us")[0].phonemes
        assert "ɹˈɛd" in found and "ɹəkˈɔɹd" in found
