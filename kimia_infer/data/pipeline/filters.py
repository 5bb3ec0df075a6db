"""Which segments are good enough to train on, and why others are not."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from kimia_infer.data.manifests import WITHOUT_SPACES
from kimia_infer.data.pipeline.quality import Quality
from kimia_infer.data.pipeline.recognition import Heard
from kimia_infer.data.pipeline.turns import Segment

DIGIT_LETTERS = 4
"""So many are spoken for a digit, as in "five"."""
LONGEST_PHRASE = 10
"""Words, or characters of languages without spaces, of a phrase that is looked for again."""

Share = Annotated[float, Field(ge=0, le=1)]
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


class Limits(BaseModel):
    """What a segment needs; strict, and documented by the descriptions."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    languages: tuple[str, ...] = Field(
        ("en", "zh"), strict=False, min_length=1, description="that are kept (the report's)"
    )
    shortest: float = Field(1.0, ge=0.1, description="seconds of a segment")
    level: float = Field(-45.0, le=0, description="dBFS of its loudest 100 ms at least")
    clipped: Share = Field(0.001, description="share of clipped samples at most")
    bandwidth: float = Field(3000.0, ge=0, description="highest frequency in Hz at least")
    score: float = Field(2.0, ge=1, le=5, description="DNSMOS at least, 1 to 5")
    overlap: Share = Field(0.1, description="share in which others talk, too, at most")
    slowest: float = Field(3.0, ge=0, description="letters per second at least")
    fastest: float = Field(28.0, gt=0, description="letters per second at most")
    slowest_unspaced: float = Field(0.7, ge=0, description="the same, languages without spaces")
    fastest_unspaced: float = Field(9.0, gt=0, description="the same, languages without spaces")
    repeated: Share = Field(0.4, description="share of the text that repeats what is before it")
    certainty: Share = Field(0.5, description="probability of the language at least")
    confidence: float = Field(
        -0.9, le=0, description="mean logarithm of the probabilities of the text at least"
    )
    difference: float = Field(
        0.3, ge=0, description="error rate between the texts of two recognizers at most"
    )


@dataclass(frozen=True)
class Measured:
    """All that is known about a segment. ``second`` is another recognizer's, if there is one."""

    segment: Segment
    quality: Quality
    heard: Heard
    second: Heard | None = None
    difference: float | None = None

    @property
    def language(self) -> str | None:
        if self.heard.language is None and self.second is not None:
            return self.second.language
        return self.heard.language


def sound_fault(segment: Segment, quality: Quality, limits: Limits) -> str | None:
    """Why a segment is dropped before it is transcribed: the name of a limit; None if it is not."""
    checks = {
        "shortest": segment.seconds >= limits.shortest,
        "overlap": segment.overlap <= limits.overlap,
        "level": quality.level_dbfs >= limits.level,
        "clipped": quality.clipped <= limits.clipped,
        "bandwidth": quality.bandwidth_hz >= limits.bandwidth,
        "score": quality.score >= limits.score,
    }
    return next((name for name, good in checks.items() if not good), None)


def text_fault(found: Measured, limits: Limits) -> str | None:
    """Why a segment is dropped for what was heard: ``empty`` or a limit's name; None if it is not.

    What no recognizer tells, such as the language where there is no multilingual one, is not
    checked.
    """
    heard = [one for one in (found.heard, found.second) if one is not None]
    tells = next((one for one in heard if one.language is not None), None)
    checks: Mapping[str, Callable[[], bool]] = {
        "empty": lambda: all(_WORD.search(one.text) for one in heard),
        "languages": lambda: tells is None or tells.language in limits.languages,
        "certainty": lambda: tells is None or (tells.certainty or 0) >= limits.certainty,
        "repeated": lambda: repeated_share(found.heard.text, found.language) <= limits.repeated,
        "rate": lambda: _speakable(found, limits),
        "confidence": lambda: all((one.confidence or 0) >= limits.confidence for one in heard),
        "difference": lambda: (found.difference or 0) <= limits.difference,
    }
    return next((name for name, good in checks.items() if not good()), None)


def _speakable(found: Measured, limits: Limits) -> bool:
    letters = "".join(_WORD.findall(found.heard.text))
    if found.language in WITHOUT_SPACES:
        rate = len(letters) / found.segment.seconds
        return limits.slowest_unspaced <= rate <= limits.fastest_unspaced
    digits = sum(letter.isdigit() for letter in letters)
    rate = (len(letters) + (DIGIT_LETTERS - 1) * digits) / found.segment.seconds
    return limits.slowest <= rate <= limits.fastest


def repeated_share(text: str, language: str | None) -> float:
    """The share of words that only repeat the words before them, one to ten at a time.

    Of languages without spaces it is a share of characters.
    """
    words = _WORD.findall(text.casefold())
    if language in WITHOUT_SPACES:
        words = list("".join(words))
    if len(words) < 3:  # "five five" is a number
        return 0.0
    again, place = 0, 0
    while place < len(words):
        for size in range(1, LONGEST_PHRASE + 1):
            phrase = words[place : place + size]
            if place >= size and phrase == words[place - size : place]:
                again, place = again + size, place + size
                break
        else:
            place += 1
    return again / len(words)


def describe(limits: Limits) -> list[str]:
    """A line for every limit: name, value and meaning."""
    fields = Limits.model_fields.items()
    values = limits.model_dump()
    return [f"{name} {values[name]}: {field.description}" for name, field in fields]
