"""Conversations of the small world, spoken by espeak-ng's voices, in the formats of this project.

The folder of a world contains

    user/*.wav          16 kHz, 16 bit: users, in many voices
    clips/*.wav         16 kHz, 16 bit: sounds that users ask about
    SET.jsonl           conversations for fine-tuning; SET is one of SETS
    speech_SET.jsonl    every recording of a user, once: audio, text, voice, phones

Audio paths are relative to the folder. Answers are in the folder ``voice`` beside it, see voice.py.
``phones`` are pairs of a phoneme's name and the second at which it begins.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
from tqdm import tqdm

from kimia_infer.api.reading import READ
from kimia_infer.api.transcription import INSTRUCTION
from kimia_infer.audio.files import FULL_SCALE, SAMPLE_RATE, load_audio, wav_bytes, write_wav
from kimia_infer.data.conversations import UNDERSTANDING, ConversationFile
from kimia_infer.utils.files import write_json_lines
from scripts.miniature.espeak import RATE, speak_all
from scripts.miniature.phones import Phones, of_espeak
from scripts.miniature.sounds import ASKED, CLASSES, HELD_OUT_SEEDS, clip
from scripts.miniature.voices import ANSWER_VOICE, Person, Utterance, Voice
from scripts.miniature.world.splits import Dialogue, Turn
from scripts.miniature.world.unknown import unknown

ANSWER_RATE = 24_000
"""Sample rate of the vocoder (published configuration)."""

LANGUAGES = ("en-us", "en")
VARIANTS = (
    "Alex", "Alicia", "Andrea", "Andy", "Annie", "Denis", "Diogo", "Gene", "Gene2", "Henrique",
    "Hugo", "Jacky", "Lee", "Marco", "Mario", "Michael", "Nguyen", "adam", "anika", "antonio",
    "aunty", "benjamin", "boris", "caleb", "ed", "edward", "edward2", "f1", "f2", "f5", "grandma",
    "grandpa", "iven", "iven3", "john", "kaukovalta", "linda", "m1", "m3", "m4", "m5", "m7", "m8",
    "marcelo", "max", "michel", "miguel", "norbert", "pablo", "paul", "pedro", "quincy", "sandro",
    "shelby", "travis", "victor", "zac",
)  # fmt: skip
HELD_OUT_VARIANTS = ("Mike", "belinda", "david", "f4", "m2", "m6", "robert", "steph")
"""Different from those for training; variants derived from these are in neither."""

RATES, HELD_OUT_RATES = range(140, 186, 5), range(142, 186, 5)
PITCHES, HELD_OUT_PITCHES = range(30, 71, 5), range(32, 71, 5)

TRANSCRIBE = (INSTRUCTION, "Please transcribe the spoken content into written text.")
"""The instructions of the service and of the published examples."""

REPEAT = "Please repeat what you hear."
SILENCES = 0.3, 0.4
"""Longest silence before and after the speech of a user, in seconds."""

LONGEST_REPEATED = 6
"""Words of a sentence to repeat or read, so that answers stay below about 2.5 s."""

POOL = {"train": 900, "validation": 40, "held_out": 100}
"""Sentences that are repeated and read, of each split: as many as the answer voice says."""

SPOKEN = "spoken answer"
"""Task type of conversations that are answered in speech and text."""

TYPED = 0.4
"""Share of the questions about a sound that are typed."""


class World(Protocol):
    """A module of :mod:`scripts.miniature.world`: its core, or the whole."""

    KINDS: Mapping[str, float]
    POOLED: bool

    def question(self, chance: random.Random, split: str) -> Turn: ...

    def dialogue(self, chance: random.Random, split: str) -> Dialogue: ...

    def sentence(self, chance: random.Random, split: str) -> str: ...


SETS = {
    "train": "train",
    "validation": "validation",
    "held_out": "held_out",
    "held_out_voices": "held_out",
}
"""The split that the texts of a set are from. All texts but those for training are different."""


@dataclass(frozen=True)
class WorldSize:
    """Conversations of each set."""

    train: int = 6000
    validation: int = 150
    held_out: int = 500
    held_out_voices: int = 500
    seed: int = 1


def draw_voice(chance: random.Random, held_out: bool) -> Voice:
    """A random voice of a user."""
    if held_out:
        choices = HELD_OUT_VARIANTS, HELD_OUT_RATES, HELD_OUT_PITCHES
    else:
        choices = VARIANTS, RATES, PITCHES
    language = chance.choice(LANGUAGES)
    variant, rate, pitch = map(chance.choice, choices)
    return Voice(f"{language}+{variant}", rate, pitch)


@dataclass(frozen=True)
class Task:
    """A conversation before synthesis; an empty ``user`` text is not spoken.

    ``clip`` is the class and the seed of a sound that the user asks about.
    """

    kind: str
    turns: tuple[Turn, ...]
    voice: Voice | Person
    instruction: str | None = None
    clip: tuple[str, int] | None = None

    @property
    def spoken(self) -> bool:
        """Whether the answers are spoken."""
        return self.kind != "transcription"

    def users(self) -> Iterator[Utterance]:
        yield from (Utterance(turn.user, self.voice) for turn in self.turns if turn.user)

    def answers(self) -> Iterator[str]:
        """Texts that the assistant says."""
        yield from (turn.answer for turn in self.turns if self.spoken)

    def line(self) -> dict:
        """The line of the JSONL."""
        messages = []
        if self.instruction:
            messages.append(text_message("user", self.instruction))
        for turn in self.turns:
            if turn.user:
                messages.append(sound_message(sound_name(Utterance(turn.user, self.voice))))
            if self.clip:
                messages.append(sound_message(clip_name(*self.clip)))
            if self.spoken:
                sound = sound_name(Utterance(turn.answer, ANSWER_VOICE))
                messages.append(spoken_answer(sound, turn.answer))
            else:
                messages.append(text_message("assistant", turn.answer))
        task_type = SPOKEN if self.spoken else UNDERSTANDING
        said = [turn.user for turn in self.turns]
        return {
            "task_type": task_type, "kind": self.kind, "voice": self.voice.name, "said": said,
            "conversation": messages,
        }  # fmt: skip


def text_message(role: str, text: str) -> dict:
    return {"role": role, "message_type": "text", "content": text}


def sound_message(sound: str) -> dict:
    return {"role": "user", "message_type": "audio", "content": sound}


def spoken_answer(recording: str, text: str) -> dict:
    return {"role": "assistant", "message_type": "audio-text", "content": [recording, text]}


@cache
def pool(world: World, split: str, count: int, seed: int = 1) -> tuple[str, ...]:
    """At most ``count`` different sentences of ``split`` that are repeated and read."""
    chance = random.Random(f"{seed} sentences {split}")
    drawn = (world.sentence(chance, split) for _ in range(20 * count))
    short = (text for text in drawn if len(text.split()) <= LONGEST_REPEATED)
    return tuple(dict.fromkeys(short))[:count]


def draw_task(
    world: World, chance: random.Random, kind: str, voice: Voice | Person, split: str
) -> Task:
    """A random conversation of ``kind`` with a user who has ``voice``."""
    if kind == "question":
        return Task(kind, (world.question(chance, split),), voice)
    if kind == "dialogue":
        return Task(kind, world.dialogue(chance, split), voice)
    if kind == "unknown":
        return Task(kind, (unknown(chance, split),), voice)
    if kind == "sound":
        name, asked = chance.choice(list(CLASSES)), chance.choice(ASKED)
        seed = chance.randrange(HELD_OUT_SEEDS) + HELD_OUT_SEEDS * (split != "train")
        if chance.random() < TYPED:
            return Task(kind, (Turn("", name),), voice, asked, (name, seed))
        return Task(kind, (Turn(asked, name),), voice, clip=(name, seed))
    if kind == "transcription":
        text = world.sentence(chance, split)
        return Task(kind, (Turn(text, text),), voice, chance.choice(TRANSCRIBE))
    if world.POOLED:
        text = chance.choice(pool(world, split, POOL[split]))
    else:
        text = world.sentence(chance, split)
        while len(text.split()) > LONGEST_REPEATED:
            text = world.sentence(chance, split)
    if kind == "repeat":
        return Task(kind, (Turn(text, text),), voice, REPEAT)
    return Task(kind, (Turn("", text),), voice, READ + text)


def draw_tasks(world: World, name: str, count: int, seed: int) -> list[Task]:
    """``count`` conversations of the set ``name``; fewer if different texts run out."""
    chance = random.Random(f"{seed} {name}")
    tasks: list[Task] = []
    for kind, share in world.KINDS.items():
        wanted, seen = round(share * count), set()
        for _ in range(20 * count if wanted else 0):
            voice = draw_voice(chance, name == "held_out_voices")
            task = draw_task(world, chance, kind, voice, SETS[name])
            if name == "train" or (task.turns, task.clip) not in seen:
                seen.add((task.turns, task.clip))
                tasks.append(task)
                wanted -= 1
            if not wanted:
                break
    chance.shuffle(tasks)
    return tasks


def sound_name(utterance: Utterance) -> str:
    """Path of a recording, relative to the folder of its world."""
    kind = "../voice" if utterance.voice == ANSWER_VOICE else "user"
    mark = hashlib.sha256(repr(utterance).encode()).hexdigest()[:16]
    return f"{kind}/{mark}.wav"


def clip_name(name: str, seed: int) -> str:
    return f"clips/{name.replace(' ', '_')}_{seed}.wav"


def write_world(folder: Path, size: WorldSize, world: World) -> None:
    """Write recordings of users and lists of ``world`` to ``folder``.

    Raises:
        ConfigurationError: espeak-ng is missing or lacks a voice.
    """
    tasks = {name: draw_tasks(world, name, getattr(size, name), size.seed) for name in SETS}
    users = {
        name: list(dict.fromkeys(u for task in members for u in task.users()))
        for name, members in tasks.items()
    }
    phones = write_recordings(folder, dict.fromkeys(u for some in users.values() for u in some))
    for name, utterances in users.items():
        lines = (recording_line(sound_name(u), u, phones[u]) for u in utterances)
        write_json_lines(folder / f"speech_{name}.jsonl", lines)
    for name, members in tasks.items():
        write_clips(folder, members)
        write_json_lines(folder / f"{name}.jsonl", (task.line() for task in members))


def recording_line(audio: str, utterance: Utterance, phones: Phones) -> dict:
    return {
        "audio": audio, "text": utterance.text, "voice": utterance.voice.name, "phones": phones
    }  # fmt: skip


def write_clips(folder: Path, tasks: Iterable[Task]) -> None:
    """Write the sounds that are asked about."""
    for task in tasks:
        if task.clip is not None:
            path = folder / clip_name(*task.clip)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_wav(path, clip(*task.clip), SAMPLE_RATE)


def write_recordings(folder: Path, utterances: Collection[Utterance]) -> dict[Utterance, Phones]:
    """Write the recordings of users; returns the phones of every utterance."""
    phones = {}
    spoken = speak_all(utterances)
    spoken = tqdm(spoken, total=len(utterances), desc="Speaking", unit=" sounds", disable=None)
    for utterance, speech in zip(utterances, spoken, strict=True):
        before, after = silences(utterance)
        around = round(before * SAMPLE_RATE), round(after * SAMPLE_RATE)
        path = folder / sound_name(utterance)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_wav(path, np.pad(resampled(speech.wave, SAMPLE_RATE), around), SAMPLE_RATE)
        starts = ((phone, round(before + start / RATE, 4)) for phone, start in speech.phones)
        phones[utterance] = of_espeak(starts)
    return phones


def silences(utterance: Utterance) -> tuple[float, float]:
    """Seconds of silence before and after a recording."""
    chance, (before, after) = random.Random(repr(utterance)), SILENCES
    return chance.uniform(0.0, before), chance.uniform(0.0, after)


def resampled(wave: np.ndarray, rate: int) -> np.ndarray:
    """int16 [samples] of the synthesizer as float32 at ``rate``."""
    return load_audio(wav_bytes(wave / FULL_SCALE, RATE), sample_rate=rate)


def read_lines(path: Path) -> list[dict]:
    """The conversations of a set, with absolute paths of recordings."""
    file, folder = ConversationFile(path), path.parent.resolve()
    lines = [file.raw(index) for index in range(len(file))]
    for message in (message for line in lines for message in line["conversation"]):
        content = message["content"]
        if message["message_type"] == "audio":
            message["content"] = str(folder / content)
        elif message["message_type"] == "audio-text":
            message["content"] = [str(folder / content[0]), content[1]]
    return lines
