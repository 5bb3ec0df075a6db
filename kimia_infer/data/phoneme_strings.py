"""Strings of phonemes that resemble English, for training that needs no data.

The words are made up of syllables that English has, between real function words. A model of prosody
hears in them which sounds follow each other, where stress lies and how punctuation ends a phrase.
"""

from __future__ import annotations

import random

_ONSETS = """
b d f ɡ h ʤ k l m n p ɹ s t v w z ʃ ʧ θ j bl bɹ dɹ fl fɹ ɡl ɡɹ kl kɹ kw pl pɹ sk sl sm sn sp st
stɹ sw tɹ tw θɹ
"""
_STRESSED = "æ ɑ ɛ ɪ i ʌ ʊ u ɔ A I O W Y ɜɹ"
_WEAK = "ə ɪ i əɹ"
_CODAS = "n t d s z l k m ɹ p v f ŋ st nd nt ks lz ts"
_SMALL_WORDS = """
ðə ɐ ænd ɪn ʌv tə hi ʃi ɪt wʌz wɪð fɔɹ bˌʌt ˌɔn ðæt ju ɪz æt ðA hɪz hɜɹ æz nˌɑt wi fɹʌm
"""
_ENDS = (".", ".", ".", ".", ".", ".", "?", "!")


def phoneme_string(seed: int, index: int) -> str:
    """The string ``index`` of those of ``seed``: a sentence of 2 to 16 words."""
    draws = random.Random(f"{seed} {index}")
    words = []
    for _ in range(draws.choice((2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16))):
        words.append(_one(_SMALL_WORDS, draws) if draws.random() < 0.3 else _word(draws))
        if draws.random() < 0.1:
            words[-1] += draws.choice((",", ",", ",", ";", ":"))
    return " ".join(words).rstrip(",;:") + draws.choice(_ENDS)


def _one(choices: str, draws: random.Random) -> str:
    return draws.choice(choices.split())


def _word(draws: random.Random) -> str:
    """One to four syllables, of which one is stressed."""
    count = draws.choice((1, 1, 1, 2, 2, 2, 3, 4))
    stressed = draws.randrange(min(count, 2))
    syllables = []
    for place in range(count):
        onset = _one(_ONSETS, draws) if place or draws.random() < 0.85 else ""
        vowel = "ˈ" + _one(_STRESSED, draws) if place == stressed else _one(_WEAK, draws)
        closed = draws.random() < (0.7 if place == count - 1 else 0.15)
        syllables.append(onset + vowel + (_one(_CODAS, draws) if closed else ""))
    return "".join(syllables)
