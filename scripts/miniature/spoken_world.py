"""The spoken small world: voices, recordings, and lists in the formats of this project.

The folder of a world contains

    user/*.wav          16 kHz, 16 bit: users, in many voices
    answer/*.wav        24 kHz, 16 bit: the assistant, in one voice
    SET.jsonl           conversations for fine-tuning; SET is one of SETS
    speech_SET.jsonl    every recording of a set, once: audio, text, phones
    voice_train.jsonl   sentences and answers in the assistant's voice: audio, text, phones
    answers_train.jsonl   the same with each short answer ANSWERS_AGAIN times
    voice_held_out.jsonl  sentences alone

Audio paths are relative to the folder. ``phones`` are pairs of a phoneme's name and the second
at which it begins. The ``kind`` of a conversation is one of KINDS.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from kimia_infer.api.reading import READ
from kimia_infer.api.transcription import INSTRUCTION
from kimia_infer.audio.files import FULL_SCALE, SAMPLE_RATE, load_audio, wav_bytes, write_wav
from kimia_infer.data.conversations import UNDERSTANDING, ConversationFile
from kimia_infer.utils.files import write_json_lines
from scripts.miniature.espeak import RATE, speak_all
from scripts.miniature.voices import Person, Utterance, Voice
from scripts.miniature.world import Turn, dialogue, question, sentence

ANSWER_VOICE = Voice("en-us+f3", 140, 50)
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

ANSWERS_AGAIN = 8
"""Copies of each short answer in the vocoder's training set: they are few, and used most.

The detokenizer's set has one of each: with this list and 5,000 steps it came nearer to a reference
voice in 63 % of 60 answers, with one of each and 4,000 steps in 90 %.
"""

SPOKEN = "spoken answer"
"""Task type of conversations that are answered in speech and text."""

KINDS = {"transcription": 0.3, "question": 0.27, "dialogue": 0.2, "repeat": 0.13, "read": 0.1}
"""Shares of the kinds of conversations."""


SETS = {
    "train": "train",
    "validation": "validation",
    "held_out": "held_out",
    "held_out_voices": "held_out",
}
"""The split that the texts of a set are from. All texts but those for training are different."""


@dataclass(frozen=True)
class WorldSize:
    """Conversations of each set, and further sentences in the assistant's voice."""

    train: int = 9000
    validation: int = 300
    held_out: int = 500
    held_out_voices: int = 500
    voice_train: int = 4000
    voice_held_out: int = 300
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
    """A conversation before synthesis; an empty ``user`` text is not spoken."""

    kind: str
    turns: tuple[Turn, ...]
    voice: Voice | Person
    instruction: str | None = None

    @property
    def spoken(self) -> bool:
        """Whether the answers are spoken."""
        return self.kind != "transcription"

    def utterances(self) -> Iterator[Utterance]:
        for turn in self.turns:
            if turn.user:
                yield Utterance(turn.user, self.voice)
            if self.spoken:
                yield Utterance(turn.answer, ANSWER_VOICE)

    def line(self) -> dict:
        """The line of the JSONL."""
        messages = []
        if self.instruction:
            messages.append(text_message("user", self.instruction))
        for turn in self.turns:
            if turn.user:
                sound = sound_name(Utterance(turn.user, self.voice))
                messages.append({"role": "user", "message_type": "audio", "content": sound})
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


def spoken_answer(recording: str, text: str) -> dict:
    return {"role": "assistant", "message_type": "audio-text", "content": [recording, text]}


def draw_task(chance: random.Random, kind: str, voice: Voice | Person, split: str) -> Task:
    """A random conversation of ``kind`` with a user who has ``voice``."""
    if kind == "question":
        return Task(kind, (question(chance, split),), voice)
    if kind == "dialogue":
        return Task(kind, dialogue(chance, split), voice)
    text = sentence(chance, split)
    if kind == "transcription":
        return Task(kind, (Turn(text, text),), voice, chance.choice(TRANSCRIBE))
    while len(text.split()) > LONGEST_REPEATED:
        text = sentence(chance, split)
    if kind == "repeat":
        return Task(kind, (Turn(text, text),), voice, REPEAT)
    return Task(kind, (Turn("", text),), voice, READ + text)


def draw_tasks(name: str, count: int, seed: int) -> list[Task]:
    """``count`` conversations of the set ``name``; fewer if different texts run out."""
    chance = random.Random(f"{seed} {name}")
    tasks: list[Task] = []
    for kind, share in KINDS.items():
        wanted, seen = round(share * count), set()
        for _ in range(20 * count if wanted else 0):
            voice = draw_voice(chance, name == "held_out_voices")
            task = draw_task(chance, kind, voice, SETS[name])
            if name == "train" or task.turns not in seen:
                seen.add(task.turns)
                tasks.append(task)
                wanted -= 1
            if not wanted:
                break
    chance.shuffle(tasks)
    return tasks


def draw_sentences(split: str, count: int, seed: int) -> list[str]:
    """At most ``count`` different sentences of ``split``."""
    chance = random.Random(f"{seed} sentences {split}")
    return list(dict.fromkeys(sentence(chance, split) for _ in range(20 * count)))[:count]


def sound_name(utterance: Utterance) -> str:
    """Path of a recording, relative to the folder of its world."""
    kind = "answer" if utterance.voice == ANSWER_VOICE else "user"
    mark = hashlib.sha256(repr(utterance).encode()).hexdigest()[:16]
    return f"{kind}/{mark}.wav"


def write_world(folder: Path, size: WorldSize) -> None:
    """Write recordings and lists of a world to ``folder``.

    Raises:
        ConfigurationError: espeak-ng is missing or lacks a voice.
    """
    tasks = {name: draw_tasks(name, getattr(size, name), size.seed) for name in SETS}
    lists = {
        f"speech_{name}": list(dict.fromkeys(u for task in members for u in task.utterances()))
        for name, members in tasks.items()
    }
    for split in ("train", "held_out"):
        texts = draw_sentences(split, getattr(size, f"voice_{split}"), size.seed)
        lists[f"voice_{split}"] = [Utterance(text, ANSWER_VOICE) for text in texts]
    known = set(lists["voice_train"])
    short = [u for u in lists["speech_train"] if u.voice == ANSWER_VOICE and u not in known]
    lists["answers_train"] = lists["voice_train"] + short * ANSWERS_AGAIN
    lists["voice_train"] += short
    phones = write_recordings(folder, dict.fromkeys(u for us in lists.values() for u in us))
    for name, utterances in lists.items():
        lines = (
            {
                "audio": sound_name(u), "text": u.text, "voice": u.voice.name, "phones": phones[u]
            }
            for u in utterances
        )  # fmt: skip
        write_json_lines(folder / f"{name}.jsonl", lines)
    for name, members in tasks.items():
        write_json_lines(folder / f"{name}.jsonl", (task.line() for task in members))


def write_recordings(
    folder: Path, utterances: Collection[Utterance]
) -> dict[Utterance, list[tuple[str, float]]]:
    """Write the recordings; returns the phones of every utterance."""
    phones = {}
    spoken = speak_all(utterances)
    spoken = tqdm(spoken, total=len(utterances), desc="Speaking", unit=" sounds", disable=None)
    for utterance, speech in zip(utterances, spoken, strict=True):
        before, after = silences(utterance)
        rate = ANSWER_RATE if utterance.voice == ANSWER_VOICE else SAMPLE_RATE
        around = round(before * rate), round(after * rate)
        path = folder / sound_name(utterance)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_wav(path, np.pad(resampled(speech.wave, rate), around), rate)
        starts = ((phone, round(before + start / RATE, 4)) for phone, start in speech.phones)
        phones[utterance] = list(starts)
    return phones


def silences(utterance: Utterance) -> tuple[float, float]:
    """Seconds of silence before and after a recording; the assistant's have none."""
    if utterance.voice == ANSWER_VOICE:
        return 0.0, 0.0
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
