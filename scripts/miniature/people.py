"""The small world as people say it: Kokoro's voices ask, the assistant answers as ever.

The folder of the people contains

    user/*.wav      16 kHz, 16 bit: what they say, without silence around it
    words/*.wav     single words, cut out of lists that some of them read
    words.jsonl     audio, text and voice of these
    answer/*.wav    24 kHz, 16 bit: the assistant
    SET.jsonl       conversations as in a spoken world; SET is one of SETS

The held-out set has voices and texts that training does not have. Recordings that are there
already are kept, so that an interrupted synthesis resumes.
"""

from __future__ import annotations

import hashlib
import random
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import soxr
import torch
from tqdm import tqdm

from kimia_infer.api.events import AudioChunk, Completion, WordTime
from kimia_infer.api.kokoro import Kokoro
from kimia_infer.audio.files import SAMPLE_RATE, write_wav
from kimia_infer.utils.files import write_json_lines
from scripts.miniature.spoken_world import (
    ANSWER_VOICE,
    Task,
    draw_task,
    sound_name,
    write_recordings,
)
from scripts.miniature.voices import ACCENTS, ENGLISH, Person, Utterance, draw_person
from scripts.miniature.world import SPLITS, questions

SETS = {"held_out": "held_out", "validation": "validation", "train": "train"}
"""The split that the texts of a set are from."""

KINDS = {"transcription": 0.3, "question": 0.4, "dialogue": 0.2, "repeat": 0.1}
"""Shares of the kinds of conversations; reading aloud has no sound of a user."""

READERS = (*ENGLISH[::2], *ENGLISH[1::4], *ACCENTS[::6])
"""Voices that read lists of the words of questions."""

READ_TOGETHER = 7
"""Words of a list: each is spoken as one of several, and the lists are short."""

BEFORE, AFTER = 0.06, 0.12
"""Seconds that are kept around what is cut out of a recording."""


@dataclass(frozen=True)
class PeopleSize:
    """Conversations of each set."""

    train: int = 500
    validation: int = 50
    held_out: int = 150
    readers: int = len(READERS)
    seed: int = 1


def write_people(folder: Path, size: PeopleSize, kokoro: Path) -> None:
    """Write recordings and lists to ``folder``; train.jsonl last.

    Args:
        kokoro: a checkpoint directory of Kokoro.
    """
    tasks = {name: draw_people(name, getattr(size, name), size.seed) for name in SETS}
    drawn = {u: None for members in tasks.values() for task in members for u in task.utterances()}
    lists = list(word_lists(READERS[: size.readers], size.seed))
    work: list[Utterance | WordList] = [u for u in drawn if isinstance(u.voice, Person)]
    write_speech(folder, [*lists, *work], kokoro)
    write_recordings(folder, [u for u in drawn if u.voice == ANSWER_VOICE])
    words = (
        {"audio": word_name(listed.voice, word), "text": word, "voice": listed.voice}
        for listed in lists
        for word in listed.words
    )
    write_json_lines(folder / "words.jsonl", words)
    for name, members in tasks.items():
        write_json_lines(folder / f"{name}.jsonl", (task.line() for task in members))


def draw_people(name: str, count: int, seed: int) -> list[Task]:
    """``count`` conversations of the set ``name``, of different texts where held out."""
    chance = random.Random(f"{seed} people {name}")
    tasks: dict[object, Task] = {}
    while len(tasks) < count:
        kind = chance.choices(list(KINDS), list(KINDS.values()))[0]
        task = draw_task(chance, kind, draw_person(chance, name == "held_out"), SETS[name])
        tasks.setdefault(task if name == "train" else task.turns, task)
    return list(tasks.values())


@dataclass(frozen=True)
class WordList:
    """Words that a voice reads one after another."""

    words: tuple[str, ...]
    voice: str


def word_lists(voices: Sequence[str], seed: int) -> Iterator[WordList]:
    """Lists of every word of the questions for each of ``voices``, in random order."""
    turns = (turn for split in SPLITS for kind in questions(split).values() for turn in kind)
    known = sorted({word for turn in turns for word in turn.user.split()})
    for voice in voices:
        words = random.Random(f"{seed} words {voice}").sample(known, len(known))
        for first in range(0, len(words), READ_TOGETHER):
            yield WordList(tuple(words[first : first + READ_TOGETHER]), voice)


def word_name(voice: str, word: str) -> str:
    """Path of the recording of a word, relative to the folder of the people."""
    return f"words/{hashlib.sha256(f'{voice} {word}'.encode()).hexdigest()[:16]}.wav"


def write_speech(folder: Path, work: Sequence[Utterance | WordList], kokoro: Path) -> None:
    """Write what is missing of the recordings of ``work``, one process for each thread."""
    for name in ("user", "words"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    missing = [item for item in work if not all(path.exists() for path in paths(folder, item))]
    if not missing:
        return
    write = partial(_write, folder, kokoro)
    processes = torch.get_num_threads()
    bar = tqdm(total=len(missing), desc="People", unit=" sounds", disable=None)
    # Not forked, since PyTorch has threads.
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=_start) as pool, bar:
        for _ in pool.map(write, missing, chunksize=4):
            bar.update()


def _start() -> None:
    torch.set_num_threads(1)


@cache
def _loaded(kokoro: Path) -> Kokoro:
    return Kokoro(kokoro, "cpu")


def paths(folder: Path, item: Utterance | WordList) -> list[Path]:
    if isinstance(item, WordList):
        return [folder / word_name(item.voice, word) for word in item.words]
    return [folder / sound_name(item)]


def _write(folder: Path, kokoro: Path, item: Utterance | WordList) -> None:
    if isinstance(item, WordList):
        wave, words = _spoken(_loaded(kokoro), ", ".join(item.words), Person(item.voice, 1.0))
        parts = _parts(words, len(wave) / SAMPLE_RATE)
    else:
        assert isinstance(item.voice, Person)
        wave, words = _spoken(_loaded(kokoro), item.text, item.voice)
        parts = [(words[0].start - BEFORE, words[-1].end + AFTER)]
    for path, (start, end) in zip(paths(folder, item), parts, strict=True):
        begin = max(0, round(start * SAMPLE_RATE))
        write_wav(path, wave[begin : round(end * SAMPLE_RATE)], SAMPLE_RATE)


def _parts(words: Sequence[WordTime], seconds: float) -> list[tuple[float, float]]:
    """Where each word of a list is, with at most half of the pause on either side."""
    middles = [(a.end + b.start) / 2 for a, b in pairwise(words)]
    limits = [0.0, *middles, seconds]
    return [
        (max(word.start - BEFORE, first), min(word.end + AFTER, last))
        for word, (first, last) in zip(words, pairwise(limits), strict=True)
    ]


def _spoken(kokoro: Kokoro, text: str, person: Person) -> tuple[np.ndarray, Sequence[WordTime]]:
    """Samples at 16 kHz, and the words with their times."""
    british = person.name.startswith("b")
    language = "en-gb" if british else "en-us"
    seed = zlib.crc32(f"{text} {person}".encode())
    events = kokoro.stream(text, person.name, person.speed, seed, language=language)
    chunk = next(events)
    assert isinstance(chunk, AudioChunk) and isinstance(next(events), Completion), text
    wave = soxr.resample(chunk.wav.numpy(), chunk.sample_rate, SAMPLE_RATE)
    return wave, chunk.words
