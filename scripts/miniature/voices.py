"""Who speaks in the small world: voices of espeak-ng, and natural ones of Kokoro."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Voice:
    """A setting of espeak-ng.

    ``name`` is a language with an optional variant (``en-us+f3``), ``rate`` words per minute,
    ``pitch`` 0 to 99.
    """

    name: str
    rate: int
    pitch: int


@dataclass(frozen=True)
class Person:
    """A natural voice: one of Kokoro's or a mixture (``af_heart:0.7+am_michael:0.3``).

    ``speed`` divides all durations.
    """

    name: str
    speed: float


class Utterance(NamedTuple):
    text: str
    voice: Voice | Person


ANSWER_VOICE = Person("af_heart", 1.0)
"""Of the assistant."""

ENGLISH = (
    "af_alloy", "af_aoede", "af_bella", "af_heart", "af_jessica", "af_kore", "af_nicole",
    "af_river", "af_sky", "am_adam", "am_echo", "am_fenrir", "am_liam", "am_michael", "am_onyx",
    "am_santa", "bf_emma", "bf_isabella", "bm_fable", "bm_george",
)  # fmt: skip
HELD_OUT_ENGLISH = (
    "af_nova", "af_sarah", "am_eric", "am_puck", "bf_alice", "bf_lily", "bm_daniel", "bm_lewis",
)  # fmt: skip
"""Never in training, nor in a mixture."""

ACCENTS = (
    "ef_dora", "em_alex", "em_santa", "ff_siwis", "hf_alpha", "hf_beta", "hm_omega", "hm_psi",
    "if_sara", "im_nicola", "jf_alpha", "jf_gongitsune", "jf_nezumi", "jf_tebukuro", "jm_kumo",
    "pf_dora", "pm_alex", "pm_santa", "zf_xiaobei", "zf_xiaoni", "zf_xiaoxiao", "zf_xiaoyi",
    "zm_yunjian", "zm_yunxi", "zm_yunxia", "zm_yunyang",
)  # fmt: skip
"""Voices of other languages, which speak English with an accent."""

MIXED, FOREIGN = 0.35, 0.3
"""Shares of the people in training who are mixtures of two, and whose (first) voice is foreign."""

SPEEDS = 0.8, 1.2


def draw_person(chance: random.Random, held_out: bool) -> Person:
    """A random natural voice of a user."""
    speed = round(chance.uniform(*SPEEDS), 2)
    if held_out:
        return Person(chance.choice(HELD_OUT_ENGLISH), speed)
    first = chance.choice(ACCENTS if chance.random() < FOREIGN else ENGLISH)
    second = chance.choice(ENGLISH)
    if second == first or chance.random() >= MIXED:
        return Person(first, speed)
    part = round(chance.uniform(0.3, 0.7), 1)
    return Person(f"{second}:{part}+{first}:{round(1 - part, 1)}", speed)
