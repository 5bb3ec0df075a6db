"""The small world as people say it: Kokoro's voices ask.

The folder of the people contains

    user/*.wav          16 kHz, 16 bit: what they say, without silence around it
    words/*.wav         single words, cut out of lists that some of them read
    clips/*.wav         sounds that they ask about
    words.jsonl         audio, text and voice of the words
    speech_SET.jsonl    what they say: audio, text, voice, phones
    SET.jsonl           conversations as in a spoken world; SET is one of SETS

The held-out set has voices and texts that training does not have. Recordings that are there
already are kept, so that an interrupted synthesis resumes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kimia_infer.utils.files import write_json_lines
from scripts.miniature.natural import WordList, phones_of, word_name, write_speech
from scripts.miniature.spoken_world import (
    Task,
    World,
    draw_task,
    recording_line,
    sound_name,
    write_clips,
)
from scripts.miniature.voices import ACCENTS, ENGLISH, draw_person
from scripts.miniature.world import whole

SETS = {"held_out": "held_out", "validation": "validation", "train": "train"}
"""The split that the texts of a set are from."""

KINDS = {
    "transcription": 0.24,
    "question": 0.38,
    "dialogue": 0.14,
    "repeat": 0.06,
    "unknown": 0.14,
    "sound": 0.04,
}
"""Shares of the kinds of conversations; reading aloud has no sound of a user."""

READERS = (*ENGLISH[::3], *ENGLISH[1::8], *ACCENTS[::8])
"""Voices that read lists of words."""

READ_TOGETHER = 7
"""Words of a list: each is spoken as one of several, and the lists are short."""


@dataclass(frozen=True)
class PeopleSize:
    """Conversations of each set."""

    train: int = 2800
    validation: int = 50
    held_out: int = 300
    readers: int = len(READERS)
    seed: int = 1


def write_people(folder: Path, size: PeopleSize, world: World, kokoro: Path) -> None:
    """Write recordings and lists to ``folder``; train.jsonl last.

    Args:
        kokoro: a checkpoint directory of Kokoro.
    """
    tasks = {name: draw_people(world, name, getattr(size, name), size.seed) for name in SETS}
    users = {
        name: list(dict.fromkeys(u for task in members for u in task.users()))
        for name, members in tasks.items()
    }
    lists = list(word_lists(READERS[: size.readers], size.seed))
    drawn = dict.fromkeys(u for some in users.values() for u in some)
    write_speech(folder, [*lists, *drawn], kokoro)
    words = (
        {"audio": word_name(listed.voice, word), "text": word, "voice": listed.voice}
        for listed in lists
        for word in listed.words
    )
    write_json_lines(folder / "words.jsonl", words)
    for name, utterances in users.items():
        audio = ((sound_name(u), u) for u in utterances)
        lines = (recording_line(path, u, phones_of(folder / path)) for path, u in audio)
        write_json_lines(folder / f"speech_{name}.jsonl", lines)
    for name, members in tasks.items():
        write_clips(folder, members)
        write_json_lines(folder / f"{name}.jsonl", (task.line() for task in members))


def draw_people(world: World, name: str, count: int, seed: int) -> list[Task]:
    """``count`` conversations of the set ``name``, of different texts where held out."""
    chance = random.Random(f"{seed} people {name}")
    tasks: dict[object, Task] = {}
    while len(tasks) < count:
        kind = chance.choices(list(KINDS), list(KINDS.values()))[0]
        task = draw_task(world, chance, kind, draw_person(chance, name == "held_out"), SETS[name])
        tasks.setdefault(task if name == "train" else (task.turns, task.clip), task)
    return list(tasks.values())


def question_words() -> list[str]:
    """All words of the questions for training, in alphabetical order."""
    asked = (turn.user for turns in whole.questions("train").values() for turn in turns)
    return sorted({word for text in asked for word in text.split()})


def word_lists(voices: Sequence[str], seed: int) -> Iterator[WordList]:
    """Lists of all :func:`question_words` for each of ``voices``, in random order."""
    words = question_words()
    for voice in voices:
        drawn = random.Random(f"{seed} words {voice}").sample(words, len(words))
        for first in range(0, len(drawn), READ_TOGETHER):
            yield WordList(tuple(drawn[first : first + READ_TOGETHER]), voice)
