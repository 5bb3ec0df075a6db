"""Texts in the form in which they are compared, and the choice that an answer names."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache

_SHOWN = re.compile(r"\(A\)|(?:^|\s)A[.):]", re.MULTILINE)
_ALONE = re.compile(r"[\W_]*([A-Za-z])[\W_]*")
_NAMED = (
    re.compile(r"\(([A-Za-z])\)"),
    re.compile(r"^[\W_]*([A-Z])\s*[.,:)、]"),
    re.compile(r"(?i:\b(?:answer|option|choice)\b(?:\s+is\b)?)[\W_]*([A-Z])(?![A-Za-z])"),
    re.compile(r"(?:答案|选项|选择|选)(?:应该|应当)?(?:是|为)?[\W_]*([A-Z])(?![A-Za-z])"),
)


def normalize(text: str, language: str | None) -> str:
    """Lower case, without punctuation, symbols, bracketed remarks and superfluous spaces.

    In English, contractions, spellings, titles and numbers are unified as well, as Whisper's
    published normalizer does. Other languages, and None for an unknown one, use Whisper's basic
    normalizer and keep combining marks: compatibility forms of Unicode, such as full-width
    characters, are unified, but numbers stay as they are written.
    """
    return _normalizer(language == "en")(text).strip()


def normalize_characters(text: str, language: str | None) -> str:
    """:func:`normalize` for counting characters: without any space."""
    return "".join(normalize(text, language).split())


@cache
def _normalizer(english: bool) -> Callable[[str], str]:
    if english:
        from whisper_normalizer.english import EnglishTextNormalizer

        return EnglishTextNormalizer()
    from whisper_normalizer.basic import BasicTextNormalizer

    return BasicTextNormalizer(preserve_marks=True)


def contains(text: str, words: str) -> bool:
    """Whether normalized ``text`` contains ``words`` as whole words.

    No word boundary is needed where ``words`` begins or ends with a character of a script without
    upper and lower case, such as Chinese.
    """
    if not words:
        return False
    before = "" if unicodedata.category(words[0]) == "Lo" else r"(?<!\w)"
    after = "" if unicodedata.category(words[-1]) == "Lo" else r"(?!\w)"
    return re.search(before + re.escape(words) + after, text) is not None


def chosen(answer: str, choices: Sequence[str], question: str, language: str | None) -> int | None:
    """The index of the choice that ``answer`` names; None if it names none, or several.

    If ``question`` shows letters, a letter in the answer decides: the answer is only a letter
    (``B``, ``b.``), or has one in parentheses (``(B)``), at its beginning (``B. because``) or
    after "answer", "option", "choice" or their Chinese equivalents. Different letters name no
    choice. Without a letter, the one choice counts whose normalized text the answer contains as
    whole words; a choice within a longer one that is found does not count.
    """
    answer = unicodedata.normalize("NFKC", answer)
    if _shows_letters(question):
        letters = _letters(answer, len(choices))
        if letters:
            return letters.pop() if len(letters) == 1 else None
    text, texts = normalize(answer, language), [normalize(c, language) for c in choices]
    found = [index for index, choice in enumerate(texts) if contains(text, choice)]
    longest = [i for i in found if not any(i != k and contains(texts[k], texts[i]) for k in found)]
    return longest[0] if len(longest) == 1 else None


def index_of(reference: str, choices: Sequence[str], question: str, language: str | None) -> int:
    """The index of the right choice, given by its text or, if letters are shown, its letter.

    Raises ValueError if it is none of them.
    """
    texts = [normalize(choice, language) for choice in choices]
    text = normalize(reference, language)
    if texts.count(text) == 1:
        return texts.index(text)
    alone = _ALONE.fullmatch(reference)
    if alone and _shows_letters(question):
        index = string.ascii_uppercase.index(alone[1].upper())
        if index < len(choices):
            return index
    raise ValueError(f"{reference!r} is none of the choices, {', '.join(map(repr, choices))}")


def _shows_letters(question: str) -> bool:
    """Whether the choices of a question have letters, as in ``(A) dog (B) cat``."""
    return _SHOWN.search(unicodedata.normalize("NFKC", question)) is not None


def _letters(answer: str, count: int) -> set[int]:
    """The choices, among the first ``count``, that letters in the answer name."""
    alone = _ALONE.fullmatch(answer)
    names = [alone[1]] if alone else [m[1] for p in _NAMED for m in p.finditer(answer)]
    indices = {string.ascii_uppercase.index(name.upper()) for name in names}
    return {index for index in indices if index < count}
