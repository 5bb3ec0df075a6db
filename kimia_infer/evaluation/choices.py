"""Which of several choices an answer names."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence

from kimia_infer.evaluation.normalization import normalize

_SHOWN = re.compile(r"\(A\)|(?:^|\s)A[.):]", re.MULTILINE)
_ALONE = re.compile(r"[\W_]*([A-Za-z])[\W_]*")
_NAMED = (
    re.compile(r"\(([A-Za-z])\)"),
    re.compile(r"^[\W_]*([A-Z])\s*[.,:)、]"),
    re.compile(r"(?i:\b(?:answer|option|choice)\b(?:\s+is\b)?)[\W_]*([A-Z])(?![A-Za-z])"),
    re.compile(r"(?:答案|选项|选择|选)(?:应该|应当)?(?:是|为)?[\W_]*([A-Z])(?![A-Za-z])"),
)


def chosen(answer: str, choices: Sequence[str], question: str, language: str | None) -> int | None:
    """The index of the choice that ``answer`` names; None if it names none, or several.

    A letter counts if ``question`` shows letters, and before any text: the answer is only a
    letter (``B``, ``b.``), or has one in parentheses (``(B)``), at its beginning (``B. because``)
    or after "answer", "option", "choice", or their Chinese equivalents; if these are different
    letters, none is named. Without a letter, the one choice counts whose text is found in the
    answer as whole words, normalized; a choice within a longer one that is found does not count.
    """
    answer = unicodedata.normalize("NFKC", answer)
    if shows_letters(question):
        letters = _letters(answer, len(choices))
        if letters:
            return letters.pop() if len(letters) == 1 else None
    return _by_text(normalize(answer, language), [normalize(c, language) for c in choices])


def shows_letters(question: str) -> bool:
    """Whether the choices of a question have letters, as in ``(A) dog (B) cat``."""
    return _SHOWN.search(unicodedata.normalize("NFKC", question)) is not None


def index_of(reference: str, choices: Sequence[str], question: str, language: str | None) -> int:
    """The index of the right choice, given by its text or, where letters are shown, its letter.

    Raises ValueError if it is none of them.
    """
    texts = [normalize(choice, language) for choice in choices]
    text = normalize(reference, language)
    if texts.count(text) == 1:
        return texts.index(text)
    alone = _ALONE.fullmatch(reference)
    if alone and shows_letters(question):
        index = string.ascii_uppercase.index(alone[1].upper())
        if index < len(choices):
            return index
    raise ValueError(f"{reference!r} is none of the choices, {', '.join(map(repr, choices))}")


def contains(text: str, part: str) -> bool:
    """Whether normalized ``text`` has ``part`` in it as whole words.

    Where ``part`` begins or ends with a character of a script without upper and lower case, such
    as Chinese, there need be no end of a word.
    """
    if not part:
        return False
    before = "" if unicodedata.category(part[0]) == "Lo" else r"(?<!\w)"
    after = "" if unicodedata.category(part[-1]) == "Lo" else r"(?!\w)"
    return re.search(before + re.escape(part) + after, text) is not None


def _letters(answer: str, count: int) -> set[int]:
    """The choices that letters in the answer name."""
    alone = _ALONE.fullmatch(answer)
    names = [alone[1]] if alone else [m[1] for p in _NAMED for m in p.finditer(answer)]
    indices = {string.ascii_uppercase.index(name.upper()) for name in names}
    return {index for index in indices if index < count}


def _by_text(answer: str, texts: Sequence[str]) -> int | None:
    found = [index for index, text in enumerate(texts) if contains(answer, text)]
    longest = [i for i in found if not any(i != k and contains(texts[k], texts[i]) for k in found)]
    return longest[0] if len(longest) == 1 else None
