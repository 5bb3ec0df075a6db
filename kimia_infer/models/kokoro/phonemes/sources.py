"""Who reads a language: espeak-ng, or misaki where it is asked for or the only one that can."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from kimia_infer.models.kokoro.phonemes import espeak, misaki
from kimia_infer.utils.errors import RequestError

Phonemizer = Literal["espeak", "misaki"]
"""Who reads English; the other languages have one each."""

Source = Callable[[Sequence[str]], list[str]]
"""Lines of words without punctuation to the phonemes of each, with spaces between words."""


def source_of(language: str, phonemizer: Phonemizer) -> Source:
    """Raises RequestError for a language that nothing installed here reads."""
    if language not in espeak.ESPEAK_LANGUAGES and language not in misaki.MISAKI_LANGUAGES:
        known = ", ".join(dict.fromkeys((*espeak.ESPEAK_LANGUAGES, *misaki.MISAKI_LANGUAGES)))
        raise RequestError(
            f"language: expected one of {known}, found {language!r}; or send phonemes"
        )
    by_misaki = language in misaki.MISAKI_LANGUAGES
    if by_misaki and (phonemizer == "misaki" or language not in espeak.ESPEAK_LANGUAGES):
        misaki.require(language)
        return partial(misaki.to_phonemes, language=language)
    return partial(espeak.to_phonemes, language=language)


def readable(language: str) -> bool:
    """Whether texts of a language can be read here; those of espeak-ng are taken to be."""
    if language in espeak.ESPEAK_LANGUAGES:
        return True
    return language in misaki.MISAKI_LANGUAGES and not misaki.missing(language)
