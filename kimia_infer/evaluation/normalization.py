"""Texts in the form in which they are compared, by language."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

Normalizer = Callable[[str], str]

WITHOUT_SPACES = frozenset(("zh", "yue", "ja", "th", "lo", "my"))
"""Languages written without spaces between words, whose error rate counts characters (the
published evaluation of Whisper)."""


def normalize(text: str, language: str | None) -> str:
    """Lower case, without punctuation, symbols, bracketed remarks and superfluous spaces.

    English besides has its contractions, spellings, titles and numbers unified, as Whisper's
    published normalizer does. Other languages get Whisper's basic one, with combining marks
    kept: Unicode's compatibility forms are unified, full-width characters among them, but
    numbers stay as they are written. None is a language that is not known.
    """
    return _normalizer(language == "en")(text).strip()


def normalize_characters(text: str, language: str | None) -> str:
    """:func:`normalize` for counting characters: without any space."""
    return "".join(normalize(text, language).split())


@cache
def _normalizer(english: bool) -> Normalizer:
    if english:
        from whisper_normalizer.english import EnglishTextNormalizer

        return EnglishTextNormalizer()
    from whisper_normalizer.basic import BasicTextNormalizer

    return BasicTextNormalizer(preserve_marks=True)
