"""What Kokoro itself says to made-up strings, whose durations are known: the aligner's data."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from kimia_infer.api.kokoro import Kokoro
from kimia_infer.data.phoneme_strings import phoneme_string
from kimia_infer.models.kokoro.config import HARMONICS
from kimia_infer.models.kokoro.network import batch_of

SEED = 4242
HELD_OUT = ("af_bella", "af_heart", "am_adam", "am_fenrir", "bf_emma", "bm_george")
"""Voices that the aligner never hears in training."""

SPEEDS = (0.8, 0.9, 1.0, 1.0, 1.1, 1.25)

_VOWELS = "æɑɛɪiʌʊuɔəaɒAIOQWY"
_BRITISH = {
    "ɜɹ": "ɜː", "əɹ": "ə", "ɑ": "ɑː", "ɔ": "ɔː", "i": "iː", "u": "uː", "O": "Q", "æ": "a",
}  # fmt: skip


@dataclass(frozen=True)
class Utterance:
    """Phonemes and who says them how fast; of ``index`` alone."""

    index: int
    phonemes: str
    voice: str
    speed: float

    @classmethod
    def drawn(cls, index: int, voices: list[str]) -> Utterance:
        """Every third one is British."""
        draws = random.Random(index)
        british = index % 3 == 2
        known = [v for v in voices if v[0] == "ab"[british] and v not in HELD_OUT]
        voice = draws.choice(known)
        if draws.random() < 0.4:
            voice = f"{voice}:0.5+{draws.choice([v for v in known if v != voice])}:0.5"
        speed = draws.choice(SPEEDS)
        return cls(index, varied(phoneme_string(SEED, index), british, draws), voice, speed)


def varied(phonemes: str, british: bool, draws: random.Random) -> str:
    """A made-up string with what English texts have besides: weak and long sounds, quotes."""

    def sometimes(pattern: str, new: str, share: float, text: str) -> str:
        return re.sub(pattern, lambda m: m.expand(new) if draws.random() < share else m[0], text)

    text = sometimes("ə(?=[ldn])", "ᵊ", 0.3, phonemes)
    text = sometimes("[ʃʤ]", "ʒ", 0.1, text)
    text = sometimes(",", draws.choice("—…,"), 0.5, text)
    text = sometimes(r"(?<= )(\w+)(?= )", r"“\1”", 0.02, text)
    if not british:
        text = sometimes(f"(?<=[{_VOWELS}])t(?=[{_VOWELS}])", "T", 0.7, text)
        return sometimes("ə", "ᵻ", 0.15, text)
    text = sometimes("ɑ", "ɒ", 0.5, text)
    for american, own in _BRITISH.items():
        text = text.replace(american, own)
    return text


@torch.inference_mode()
def spoken(kokoro: Kokoro, utterance: Utterance) -> tuple[Tensor, dict[str, Tensor]]:
    """The wave [samples], and its ``durations``, ``pitch`` and ``energy`` as Kokoro decided."""
    network, symbols = kokoro.network, utterance.phonemes
    ids, rows = batch_of([[network.config.vocab[s] for s in symbols]], network.device)
    style = kokoro.voices.style(utterance.voice, len(symbols))[None]
    prosody = network.prosody(ids, style, torch.tensor([utterance.speed]), rows)
    generator = torch.Generator().manual_seed(utterance.index)
    (wave,) = network.waves(
        prosody, style, lambda _, samples: torch.randn(samples, HARMONICS, generator=generator)
    )
    facts = {"durations": prosody.durations, "pitch": prosody.pitch, "energy": prosody.energy}
    return wave, {name: values[0] for name, values in facts.items()}
