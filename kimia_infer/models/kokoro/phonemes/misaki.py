"""misaki, the library whose phonemes the voices were trained on, where it is installed.

It tells apart English words that are spelled alike (to *read*, has *read*), and reads Japanese and
Mandarin. It is optional: Apache-2.0, with dependencies of other licences (docs/kokoro.md).
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from kimia_infer.models.kokoro.phonemes.espeak import to_phonemes as espeak_phonemes
from kimia_infer.utils.errors import RequestError

MISAKI_LANGUAGES = ("en-us", "en-gb", "ja", "zh")

_PACKAGES = {
    "en": ("misaki", "num2words", "spacy", "en_core_web_sm"),
    "ja": ("misaki", "fugashi", "jaconv", "mojimoji", "pyopenjtalk", "unidic_lite"),
    "zh": ("misaki", "cn2an", "jieba", "ordered_set", "pypinyin"),
}
"""Modules by the language, as misaki imports them."""

_INSTALL = {
    "en": "pip install 'kimia-infer[kokoro-en]' && python -m spacy download en_core_web_sm",
    "ja": "pip install 'kimia-infer[kokoro-ja]'",
    "zh": "pip install 'kimia-infer[kokoro-zh]'",
}

_LATIN = re.compile(r"([A-Za-z](?:[A-Za-z' -]*[A-Za-z])?)")

_lock = threading.Lock()
"""Of the readers: a tagger reads one line at a time."""


def missing(language: str) -> list[str]:
    """The modules that a language of ``MISAKI_LANGUAGES`` needs and that are not installed."""
    return [name for name in _PACKAGES[language[:2]] if importlib.util.find_spec(name) is None]


def to_phonemes(lines: Sequence[str], language: str) -> list[str]:
    """The phonemes of each line of words, which has no punctuation; spaces between words.

    Latin letters in Japanese and Mandarin, and English words that misaki does not know, are read
    by espeak-ng.

    Raises:
        RequestError: what reads the language is not installed.
    """
    with _lock:
        read = _reader(language)
        return [" ".join(read(line).split()) for line in lines]


def require(language: str) -> None:
    """Raise RequestError, with what to install, unless the language can be read."""
    if absent := missing(language):
        raise RequestError(
            f"language: {language} needs {', '.join(absent)}; {_INSTALL[language[:2]]}"
        )


@cache
def _reader(language: str) -> Callable[[str], str]:
    """Reads a line; takes seconds to make."""
    require(language)
    if language == "ja":
        japanese = importlib.import_module("misaki.ja").JAG2P()
        return lambda line: _mixed(line, lambda text: japanese(text)[0])
    if language == "zh":
        mandarin = importlib.import_module("misaki.zh").ZHG2P()
        logging.getLogger("jieba").setLevel(logging.WARNING)
        return lambda line: _mixed(line, lambda text: mandarin(text)[0])

    def unknown(token: Any) -> tuple[str, int]:
        return espeak_phonemes([token.text], language)[0], 1  # the rating of a guess

    english = importlib.import_module("misaki.en").G2P(
        british=language == "en-gb", fallback=unknown
    )
    return lambda line: english(line)[0]


def _mixed(line: str, read: Callable[[str], str]) -> str:
    """A line whose words in Latin letters are English."""
    parts = _LATIN.split(line)
    parts[1::2] = espeak_phonemes(parts[1::2], "en-us") if len(parts) > 1 else []
    parts[0::2] = [read(text) if text.strip() else "" for text in parts[0::2]]
    return " ".join(parts)
