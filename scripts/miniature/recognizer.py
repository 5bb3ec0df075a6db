"""Speech recognition independent of the model: pocketsphinx with a grammar of the
small world's core.

Original and generated speech are recognized at the same level and with the same faint noise, since
digital silence disturbs the recognizer. Scores count the recognized content words; words that a
template determines do not count.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable
from typing import Literal, NamedTuple, get_args

import numpy as np

from kimia_infer.audio.files import SAMPLE_RATE
from kimia_infer.utils.errors import ConfigurationError
from scripts.miniature.world.core import NUMBERS, SENTENCES, SLOTS, fill, questions
from scripts.miniature.world.splits import SPLITS

LEVEL = 0.1
"""Root mean square that all audio is scaled to, full scale 1."""

NOISE = 1e-3
"""Standard deviation of the noise, full scale 1."""

MARGIN = 0.15
"""Seconds of noise before and after the audio."""

LISTENS = 5
"""Attempts for each audio, each with different noise; the most frequent result counts."""

SEARCH = {"wip": 0.2, "pip": 1.0}
"""Penalties of words and phones that suit answers of one word."""

ANSWERS = (
    "{number}",
    "{number} {number}",
    "{number} {number} {number}",
    "{number} {number} {number} {number}",
    "{color}",
    "okay {color} {object}",
    "okay {place}",
    "in the {place}",
)
"""Templates of answers to questions, beside those of sentences; numbers count upwards."""

OPEN_WORDS = SLOTS | {"number": NUMBERS}
CONTENT_WORDS = frozenset(word for words in OPEN_WORDS.values() for word in words)


Said = Literal["anything", "answer"]
"""What to expect: anything from the small world, or an answer to a question."""


def grammar(said: Said) -> str:
    """Everything that can be recognized, in the Java Speech Grammar Format."""
    templates = _answers() if said == "answer" else SENTENCES + _answers()
    rules = [f"<{name}> = {' | '.join(words)};" for name, words in OPEN_WORDS.items()]
    bodies = " | ".join(re.sub(r"{(\w+)}", r"<\1>", template) for template in templates)
    return "\n".join(["#JSGF V1.0;", "grammar world;", *rules, f"public <said> = {bodies};", ""])


def _answers() -> tuple[str, ...]:
    """The templates of answers, with the sequences of numbers that occur."""
    counts = {turn.answer for split in SPLITS for turn in questions(split)["count"]}
    others = [template for template in ANSWERS if template.count("{number}") < 2]
    return (*others, *sorted(counts))


def template_of(text: str) -> str:
    """The template that ``text`` fills. ValueError if it is not of the small world."""
    words = text.split()
    for template in SENTENCES + ANSWERS:
        slots = template.split()
        if len(slots) == len(words) and all(map(_fits, slots, words)):
            return template
    raise ValueError(f"{text!r} is not a sentence or an answer of the small world")


def understands(text: str) -> bool:
    """Whether ``text`` can be recognized: it is a sentence or an answer of the world's core."""
    try:
        template_of(text)
    except ValueError:
        return False
    return True


def _fits(slot: str, word: str) -> bool:
    return word in OPEN_WORDS[slot.strip("{}")] if slot.startswith("{") else word == slot


def content_words(text: str) -> Counter[str]:
    """The words of ``text`` in the open slots of its template."""
    slots = template_of(text).split()
    return Counter(w for s, w in zip(slots, text.split(), strict=True) if s.startswith("{"))


class Heard(NamedTuple):
    """The spoken text and what was recognized."""

    said: str
    understood: str


def recall(heard: Iterable[Heard]) -> float:
    """Share of the spoken content words that were recognized, in any order."""
    found = wanted = 0
    for said, understood in heard:
        words = content_words(said)
        wanted += words.total()
        found += (words & Counter(understood.split())).total()
    return found / wanted


def chance_recall(texts: Iterable[str], seed: int = 0) -> float:
    """The recall of random words in the right templates."""
    chance = random.Random(seed)
    return recall(
        Heard(text, fill(template_of(text), lambda slot: chance.choice(OPEN_WORDS[slot])))
        for text in texts
    )


class SpeechRecognizer:
    """Recognizes speech; the result depends on the audio alone.

    Raises:
        ConfigurationError: pocketsphinx does not know a word of the small world.
    """

    def __init__(self) -> None:
        from pocketsphinx import Decoder

        # Neither normalization nor the search may depend on earlier audio.
        self._decoder = Decoder(loglevel="FATAL", cmn="batch", bestpath=False, **SEARCH)
        known = {word for template in SENTENCES + ANSWERS for word in template.split()}
        known = {word for word in known if "{" not in word} | CONTENT_WORDS
        unknown = sorted(word for word in known if self._decoder.lookup_word(word) is None)
        if unknown:
            raise ConfigurationError(f"pocketsphinx does not know: {', '.join(unknown)}")
        for said in get_args(Said):
            self._decoder.add_jsgf_string(said, grammar(said))

    def hear(self, wave: np.ndarray, said: Said = "anything") -> str:
        """The text recognized in float samples [samples] at 16 kHz; "" if there is none.

        Single words are recognized better if ``said`` tells what to expect.
        """
        if not wave.size:
            return ""
        samples = np.asarray(wave, np.float64)
        level = np.sqrt(np.mean(samples**2))
        padded = np.pad(samples * (LEVEL / level if level else 1.0), round(MARGIN * SAMPLE_RATE))
        self._decoder.activate_search(said)
        found: Counter[str] = Counter()
        for seed in range(LISTENS):
            found[self._listen(padded, seed)] += 1
            if 2 * max(found.values()) > LISTENS:  # whatever the other attempts would give
                break
        return found.most_common(1)[0][0]

    def _listen(self, samples: np.ndarray, seed: int) -> str:
        noisy = samples + np.random.default_rng(seed).normal(0.0, NOISE, len(samples))
        pcm = np.clip(np.rint(noisy * 32_768), -32_768, 32_767).astype("<i2")
        self._decoder.start_utt()
        self._decoder.process_raw(pcm.tobytes(), full_utt=True)
        self._decoder.end_utt()
        found = self._decoder.hyp()
        return found.hypstr if found else ""
