"""Phones of both synthesizers by the same names."""

from __future__ import annotations

from scripts.miniature.espeak import Synthesizer
from scripts.miniature.phones import of_espeak, of_kokoro
from scripts.miniature.voices import Utterance, Voice


def test_stress_belongs_to_the_phone_behind_it_and_pauses_are_silent():
    phones = of_kokoro("ɹˈɛd, kˈʌp", [0.1 * i for i in range(11)])
    assert [name for name, _ in phones] == ["ɹ", "ɛ", "d", "_", "k", "ʌ", "p", "_"]
    assert [second for _, second in phones] == [0.0, 0.1, 0.3, 0.4, 0.6, 0.7, 0.9, 1.0]


def test_both_name_the_same_phones():
    """Of Kokoro, the phonemes that it is given for the text."""
    said = Utterance("what color is the chair okay nine", Voice("en-us+m3", 150, 50))
    speech = Synthesizer().speak(said)
    espeak = [name for name, _ in of_espeak((name, float(at)) for name, at in speech.phones)]
    phonemes = "wˌʌt kˈʌləɹ ɪz ðə ʧˈɛɹ ˌOkˈA nˈIn"
    kokoro = [name for name, _ in of_kokoro(phonemes, list(map(float, range(40))))]
    assert [name for name in espeak if name != "_"] == [name for name in kokoro if name != "_"]
