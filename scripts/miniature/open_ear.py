"""How the miniature sounds to an ear of an open vocabulary, Whisper tiny.en, and to a score.

What it says is compared with Kokoro's own speech of the same words. Needs packages that are in none
of the requirements, see :mod:`scripts.benchmark.prosody_sound`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

import jiwer
import numpy as np
import torch
from tqdm import tqdm

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.audio.files import load_audio
from scripts.miniature.scoring import Answer, recognizable
from scripts.miniature.spoken_world import sound_name
from scripts.miniature.voices import ANSWER_VOICE, Utterance
from scripts.miniature.world.core import NUMBERS
from scripts.miniature.world.numbers import HUNDRED, number

FEWEST_WORDS = 3
"""Shorter answers are not judged: Whisper does not understand Kokoro's either."""

SPELLINGS = {"ok": "okay", "grey": "gray", "oclock": "clock"}


def comparable(text: str) -> str:
    """Small letters, no punctuation, numbers in words; of more than two digits, one by one."""
    words = re.sub(r"[^a-z0-9 ]", " ", text.lower().replace("'", "")).split()
    return " ".join(_spelled_out(SPELLINGS.get(word, word)) for word in words)


def _spelled_out(word: str) -> str:
    if not word.isdigit():
        return word
    whole = int(word) <= HUNDRED and not (len(word) > 1 and word.startswith("0"))
    return number(int(word)) if whole else " ".join(NUMBERS[int(digit)] for digit in word)


def judged(text: str) -> bool:
    """Whether ``text`` is long enough, and not spelled."""
    words = text.split()
    return len(words) >= FEWEST_WORDS and any(len(word) > 1 for word in words)


def measure_speech(model: KimiAudio, given: Sequence[Answer], voice: Path) -> dict[str, float]:
    """Word errors and opinion scores (1 .. 5) of right answers, and of the answer voice itself.

    Args:
        given: answers, of which those that are right and judged count.
        voice: folder of the answer voice, see :mod:`scripts.miniature.voice`.

    Raises:
        CheckpointError: the packages are missing.
    """
    from scripts.benchmark.prosody_sound import Listener

    listener = Listener()
    chosen = [a for a in given if a.text == a.case.text and a.codes and judged(a.text)]
    waves: dict[str, Callable[[Answer], np.ndarray]] = {
        "miniature": lambda one: said(model, one),
        "kokoro": lambda one: load_audio(voice / sound_name(Utterance(one.text, ANSWER_VOICE))),
    }
    figures: dict[str, float] = {"count": len(chosen)}
    wanted = [comparable(one.text) for one in chosen]
    for name, speak in waves.items() if chosen else ():
        heard, scores = [], []
        for one in tqdm(chosen, f"Hearing {name}", disable=None):
            wave = speak(one)
            heard.append(comparable(listener.words(wave.astype(np.float32))))
            scores.append(listener.naturalness(wave))
        figures[f"{name}_word_errors"] = jiwer.wer(wanted, heard)
        figures[f"{name}_as_written"] = fmean(a == b for a, b in zip(wanted, heard, strict=True))
        figures[f"{name}_naturalness"] = fmean(scores)
    return figures


def said(model: KimiAudio, given: Answer) -> np.ndarray:
    """The speech of an answer, float [samples] at 16 kHz."""
    return recognizable(model.detokenize_audio(torch.tensor([given.codes]), seed=0))
