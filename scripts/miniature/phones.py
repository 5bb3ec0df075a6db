"""Phones of both synthesizers in the same symbols, those of Kokoro without stress and length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from kimia_infer.training.tasks.recognizer import SILENCE

JOINED = {
    "aɪ": "I", "aʊ": "W", "eɪ": "A", "oʊ": "O", "əʊ": "Q", "ɔɪ": "Y", "dʒ": "ʤ", "tʃ": "ʧ",
    "eə": "ɛ", "ɪə": "ɪ", "ʊə": "ʊ",
}  # fmt: skip
"""Phones of espeak-ng with two symbols."""

SINGLE = {"ɐ": "ə", "ɚ": "ə", "r": "ɹ", "ɾ": "T", "ʔ": "t", "g": "ɡ", "o": "ɔ", "e": "A", "a": "æ"}
"""Other symbols of the same sounds."""

STRESS, LENGTHS = "ˈˌ", "ːʰʲ"
PAUSES = ';:,.!?—…"()“”'

Phones = list[tuple[str, float]]
"""Names with the second when each begins."""


def of_espeak(phones: Iterable[tuple[str, float]]) -> Phones:
    """Of espeak-ng's names in IPA, "" for a pause."""
    return [(_symbol(name), second) for name, second in phones]


def _symbol(ipa: str) -> str:
    if not ipa:
        return SILENCE
    return JOINED.get(ipa[:2]) or SINGLE.get(ipa[0], ipa[0])


def of_kokoro(phonemes: str, seconds: Sequence[float]) -> Phones:
    """Of a string of phonemes with the ``seconds`` when each begins and, last, all end.

    A stress mark is part of the phone behind it; a mark of length, or a space, of the one before.
    """
    return [*_sounds(phonemes, seconds), (SILENCE, round(seconds[len(phonemes)], 4))]


def _sounds(phonemes: str, seconds: Sequence[float]) -> Iterator[tuple[str, float]]:
    begin = None
    for symbol, second in zip(phonemes, seconds, strict=False):
        if symbol in STRESS:
            begin = second if begin is None else begin
        elif symbol not in LENGTHS and not symbol.isspace():
            name = SILENCE if symbol in PAUSES else SINGLE.get(symbol, symbol)
            yield name, round(second if begin is None else begin, 4)
            begin = None
