"""Recordings of Kokoro's voices: what is spoken for a text, where its phones are, resumable.

Recordings that are there already are kept, so that an interrupted synthesis resumes. Beside each of
a text is a file with its phones.
"""

from __future__ import annotations

import hashlib
import json
import random
import zlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soxr
import torch
from tqdm import tqdm

from kimia_infer.api.events import WordTime
from kimia_infer.api.kokoro import FRAMES_PER_SECOND, Kokoro
from kimia_infer.audio.files import SAMPLE_RATE, write_wav
from kimia_infer.layers.sampler import SeededRandomness
from kimia_infer.models.kokoro.config import HARMONICS
from kimia_infer.models.kokoro.config import SAMPLE_RATE as KOKORO_RATE
from kimia_infer.models.kokoro.network import batch_of
from kimia_infer.utils.files import write_text
from scripts.miniature.phones import Phones, of_kokoro
from scripts.miniature.spoken_world import sound_name
from scripts.miniature.voices import ANSWER_VOICE, Person, Utterance

BEFORE, AFTER = 0.06, 0.12
"""Seconds that are kept around what is cut out of a recording."""

HESITATING = 0.12
"""Share of the users who pause within a text, half of them with a sound."""

HESITATIONS = (",", ", um,", ",", ", uh,")
ENDS = ("", ".", "?")
"""How a user's text may end, which changes the melody."""

LETTER_A = "[a](/ˈA/)"
"""The letter, which would be read as the article."""


@dataclass(frozen=True)
class WordList:
    """Words that a voice reads one after another."""

    words: tuple[str, ...]
    voice: str


class Spoken(NamedTuple):
    """``wave`` float32 [samples] at 24 kHz, its words and phones with their times."""

    wave: np.ndarray
    words: list[WordTime]
    phones: Phones


def word_name(voice: str, word: str) -> str:
    """Path of the recording of a word, relative to the folder of the people."""
    return f"words/{hashlib.sha256(f'{voice} {word}'.encode()).hexdigest()[:16]}.wav"


def paths(folder: Path, item: Utterance | WordList) -> list[Path]:
    if isinstance(item, WordList):
        return [folder / word_name(item.voice, word) for word in item.words]
    return [folder / sound_name(item)]


def phones_of(path: Path) -> Phones:
    """Those of a recording that was written here."""
    return [(name, second) for name, second in json.loads(_beside(path).read_text("utf-8"))]


def _beside(path: Path) -> Path:
    return path.with_suffix(".json")


def write_speech(folder: Path, work: Sequence[Utterance | WordList], kokoro: Path) -> None:
    """Write what is missing of the recordings of ``work``, one process for each thread.

    Args:
        kokoro: a checkpoint directory of Kokoro.
    """
    missing = [item for item in work if not all(path.exists() for path in paths(folder, item))]
    if not missing:
        return
    write = partial(_write, folder, kokoro)
    processes = torch.get_num_threads()
    bar = tqdm(total=len(missing), desc="Speaking", unit=" sounds", disable=None)
    # Not forked, since PyTorch has threads.
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=_start) as pool, bar:
        for _ in pool.map(write, missing, chunksize=4):
            bar.update()


def _start() -> None:
    torch.set_num_threads(1)


@cache
def _loaded(kokoro: Path) -> Kokoro:
    return Kokoro(kokoro, "cpu")


def _write(folder: Path, kokoro: Path, item: Utterance | WordList) -> None:
    if isinstance(item, WordList):
        spoken = _spoken(_loaded(kokoro), ", ".join(item.words), Person(item.voice, 1.0))
        parts = _parts(spoken.words, len(spoken.wave) / KOKORO_RATE)
    else:
        assert isinstance(item.voice, Person)
        spoken = _spoken(_loaded(kokoro), as_said(item), item.voice)
        parts = [(spoken.words[0].start - BEFORE, spoken.words[-1].end + AFTER)]
    answer = isinstance(item, Utterance) and item.voice == ANSWER_VOICE
    rate = KOKORO_RATE if answer else SAMPLE_RATE
    wave = soxr.resample(spoken.wave, KOKORO_RATE, rate)
    for path, (start, end) in zip(paths(folder, item), parts, strict=True):
        begin = max(0, round(start * rate))
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(item, Utterance):
            phones = [(name, round(second - begin / rate, 4)) for name, second in spoken.phones]
            write_text(_beside(path), json.dumps(phones))
        write_wav(path, wave[begin : round(end * rate)], rate)


def as_said(utterance: Utterance) -> str:
    """What Kokoro is given: letters are named; users end as they like, and some hesitate."""
    words = utterance.text.split()
    if all(len(word) == 1 for word in words):
        return ", ".join(LETTER_A if word == "a" else word for word in words) + "."
    if utterance.voice == ANSWER_VOICE:
        return f"{utterance.text}."
    chance = random.Random(repr(utterance))
    if len(words) > 2 and chance.random() < HESITATING:
        words[chance.randrange(len(words) - 1)] += chance.choice(HESITATIONS)
    return " ".join(words) + chance.choice(ENDS)


def _parts(words: Sequence[WordTime], seconds: float) -> list[tuple[float, float]]:
    """Where each word of a list is, with at most half of the pause on either side."""
    middles = [(a.end + b.start) / 2 for a, b in pairwise(words)]
    limits = [0.0, *middles, seconds]
    return [
        (max(word.start - BEFORE, first), min(word.end + AFTER, last))
        for word, (first, last) in zip(words, pairwise(limits), strict=True)
    ]


@torch.inference_mode()
def _spoken(kokoro: Kokoro, text: str, person: Person) -> Spoken:
    network = kokoro.network
    (sentence,) = kokoro.read(text, "en-gb" if person.name.startswith("b") else "en-us")
    ids, rows = batch_of([[network.config.vocab[s] for s in sentence.phonemes]], network.device)
    style = kokoro.voices.style(person.name, len(sentence.phonemes))[None]
    prosody = network.prosody(ids, style, torch.tensor([person.speed]), rows)
    randomness = SeededRandomness(zlib.crc32(f"{text} {person}".encode()))
    (wave,) = network.waves(
        prosody, style, lambda _, samples: randomness.noise(0, samples, HARMONICS)
    )
    ends = (prosody.durations[0].cumsum(0) / FRAMES_PER_SECOND).tolist()
    words = [WordTime(w.text, ends[w.start], ends[w.end]) for w in sentence.words]
    return Spoken(wave.clamp(-1, 1).numpy(), words, of_kokoro(sentence.phonemes, ends))
