"""The training data of the miniature's language model, made from conversations of the small world.

The world's users are espeak-ng's, heard as they are or in some surroundings; people are heard in
several, and questions are also joined of single words. Recordings of users and the assistant are
transcribed too, some questions are answered in text, several sentences are joined as in segments of
a long transcription, sentences are read aloud, and kinds of conversations that are learned slowly
appear again. Speech codes of every recording are computed once.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from tqdm import tqdm

from kimia_infer.audio.files import SAMPLE_RATE, load_audio, write_wav
from kimia_infer.data.conversations import UNDERSTANDING
from kimia_infer.models.kimi_audio.checkpoint import SPEECH_TOKENIZER_FOLDER
from kimia_infer.models.kimi_audio.components import speech_tokenizer_component
from kimia_infer.models.kimi_audio.config import LanguageModelConfig
from kimia_infer.models.kimi_audio.encoders import SEGMENT_SAMPLES, SpeechCodes
from kimia_infer.training.tasks.recordings import find_recordings
from kimia_infer.utils.files import write_json_lines
from scripts.miniature.spoken_world import (
    READ,
    SPOKEN,
    TRANSCRIBE,
    read_lines,
    spoken_answer,
    text_message,
)
from scripts.miniature.surroundings import Surroundings, draw_surroundings
from scripts.miniature.world import NUMBERS

JOINED_SENTENCES = (2, 2, 3, 3, 4)
"""Numbers of sentences in a joined recording, equally likely."""

PAUSES = (0.0, 0.5)
"""Shortest and longest silence between joined sentences, in seconds."""

WORD_PAUSES = (0.0, 0.35)
"""The same between joined words."""

HESITATION, HESITATIONS = 0.1, (0.4, 1.0)
"""Share of the pauses between words that are long, and how long they are."""

BARE_SUMS = 0.5
"""Share of the questions of joined words that are a sum alone."""

UNCHANGED = 0.4
"""Share of espeak-ng's conversations that are heard as they were synthesized."""

WRITTEN_ANSWERS = 0.25
"""Share of the questions that are also answered in text only."""

REPEATED = ("question", "dialogue")
"""Kinds of lines that appear twice, since they are learned slowly: answers have to be found."""

SEED = 3
Heard = tuple[str, str]  # path and text of a recording
Item = TypeVar("Item")


@dataclass(frozen=True)
class Amounts:
    """How much of each there is.

    Args:
        surroundings: how often each conversation of people is heard.
        spelled: questions joined of single words.
        joined: recordings of several sentences.
        transcribed: share of the users' other recordings that are also transcribed.
    """

    surroundings: int = 5
    spelled: int = 1500
    joined: int = 1500
    transcribed: float = 0.25


def write_conversations(
    world: Path, people: Path, base: Path, target: Path, amounts: Amounts
) -> None:
    """Write validation.jsonl and train.jsonl with the ids of all speech codes to ``target``.

    Paths in them are absolute, so ``target`` must not be moved.

    Args:
        world: folder of the spoken world.
        people: folder of its people.
        base: checkpoint whose speech tokenizer and ids are used.
        target: folder that is written.
    """
    chance, heard_there = random.Random(SEED), HeardRecordings(target / "heard")
    drawn = read_lines(world / "train.jsonl")
    again = [line for line in drawn if line["kind"] in REPEATED]
    spoken = read_lines(people / "train.jsonl") * amounts.surroundings
    spelled = _spelled(chance, people, drawn, amounts.spelled, target / "spelled")
    lines = [
        *(heard_there.elsewhere(chance, line, UNCHANGED) for line in [*drawn, *again]),
        *(
            heard_there.elsewhere(chance, line)
            for line in tqdm([*spoken, *spelled], "Surroundings", disable=None)
        ),
    ]
    users = sorted({item for line in lines for item in _user_recordings(line)})
    answers = sorted({item for line in lines for item in _answer_recordings(line)})
    others = [line for line in lines if line["kind"] != "transcription"]
    others = sorted({item for line in others for item in _user_recordings(line)})
    heard = _some(chance, others, amounts.transcribed) + answers
    recordings = _join_sentences(chance, users, amounts.joined, target / "joined")
    train = [
        *lines,
        *[_transcription(chance, item) for item in heard],
        *_written_answers(chance, lines),
        *_read_aloud(world),
        *(_transcription(chance, item) for item in recordings),
    ]
    validation = read_lines(world / "validation.jsonl")
    validation += [
        heard_there.elsewhere(chance, line) for line in read_lines(people / "validation.jsonl")
    ]
    _add_codes(base, validation + train)
    write_json_lines(target / "validation.jsonl", validation)
    write_json_lines(target / "train.jsonl", train)  # last: when it exists, both do


def _some(chance: random.Random, items: Sequence[Item], share: float) -> list[Item]:
    return chance.sample(items, round(share * len(items)))


class HeardRecordings:
    """Recordings in ``folder`` as they are heard in some surroundings; existing ones are kept."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def elsewhere(self, chance: random.Random, line: dict, unchanged: float = 0.0) -> dict:
        """A copy of a conversation, heard in random surroundings.

        ``unchanged`` is the probability that the recordings stay as they are.
        """
        line = deepcopy(line)
        surroundings = draw_surroundings(chance)
        if chance.random() >= unchanged:
            for message in line["conversation"]:
                if message["message_type"] == "audio":
                    message["content"] = self.heard(message["content"], surroundings)
        return line

    def heard(self, recording: str, surroundings: Surroundings) -> str:
        """Path of the recording as it is heard."""
        mark = hashlib.sha256(f"{recording} {surroundings}".encode()).digest()
        path = self.folder / f"{mark.hex()[:16]}.wav"
        if not path.exists():
            wave = surroundings.heard(load_audio(Path(recording)), int.from_bytes(mark[:4]))
            write_wav(path, wave, SAMPLE_RATE)
        return str(path.resolve())


def _spelled(
    chance: random.Random, people: Path, lines: Sequence[dict], count: int, folder: Path
) -> Iterator[dict]:
    """Questions of ``lines`` that are joined of words which people said alone."""
    words: dict[str, dict[str, str]] = {}
    for entry in map(json.loads, (people / "words.jsonl").read_text("utf-8").splitlines()):
        words.setdefault(entry["voice"], {})[entry["text"]] = str(people / entry["audio"])
    asked = [line for line in lines if line["kind"] == "question"]
    bare = [line for line in asked if line["said"][0].split()[0] in NUMBERS] or asked
    for _ in range(count if words else 0):
        line = deepcopy(chance.choice(bare if chance.random() < BARE_SUMS else asked))
        known = words[chance.choice(sorted(words))]
        pieces = [load_audio(Path(known[word])) for word in line["said"][0].split()]
        pauses = [_pause(chance) for _ in pieces]
        line["conversation"][0]["content"] = _write_joined(pieces, pauses, folder)
        yield line


def _pause(chance: random.Random) -> float:
    return chance.uniform(*(HESITATIONS if chance.random() < HESITATION else WORD_PAUSES))


def _user_recordings(line: dict) -> Iterator[Heard]:
    paths = [m["content"] for m in line["conversation"] if m["message_type"] == "audio"]
    yield from zip(paths, (text for text in line["said"] if text), strict=True)


def _answer_recordings(line: dict) -> Iterator[Heard]:
    for message in line["conversation"]:
        if message["message_type"] == "audio-text":
            path, text = message["content"]
            yield path, text


def _transcription(chance: random.Random, heard: Heard) -> dict:
    path, text = heard
    messages = [
        text_message("user", chance.choice(TRANSCRIBE)),
        {"role": "user", "message_type": "audio", "content": path},
        text_message("assistant", text),
    ]
    return {"task_type": UNDERSTANDING, "kind": "transcription", "conversation": messages}


def _written_answers(chance: random.Random, lines: Sequence[dict]) -> Iterator[dict]:
    """Some questions again, with answers in text only."""
    questions = [line for line in lines if line["kind"] == "question"]
    for line in chance.sample(questions, round(WRITTEN_ANSWERS * len(questions))):
        question, answer = line["conversation"]
        messages = [question, text_message("assistant", answer["content"][1])]
        yield {"task_type": UNDERSTANDING, "kind": "written", "conversation": messages}


def _read_aloud(world: Path) -> Iterator[dict]:
    """Requests to read the sentences that were spoken in the assistant's voice."""
    for sentence in find_recordings(world / "voice_train.jsonl", world.resolve(), needs_text=True):
        text = sentence.text or ""
        messages = [text_message("user", READ + text), spoken_answer(str(sentence.path), text)]
        yield {"task_type": SPOKEN, "kind": "read", "conversation": messages}


def _join_sentences(
    chance: random.Random, heard: Sequence[Heard], count: int, folder: Path
) -> Iterator[Heard]:
    """Write recordings of several sentences with pauses, of at most a segment's length.

    Names are checksums of the content, so that existing recordings keep their cached features.
    """
    for _ in tqdm(range(count), desc="Joining", unit=" recordings", disable=None):
        waves, texts, pauses, length = [], [], [], 0.0
        for path, text in chance.choices(heard, k=chance.choice(JOINED_SENTENCES)):
            wave, pause = load_audio(Path(path)), chance.uniform(*PAUSES)
            length += len(wave) / SAMPLE_RATE + pause
            if length > SEGMENT_SAMPLES / SAMPLE_RATE:
                break
            waves.append(wave)
            pauses.append(pause)
            texts.append(text)
        yield _write_joined(waves, pauses, folder), " ".join(texts)


def _write_joined(waves: Iterable[np.ndarray], pauses: Iterable[float], folder: Path) -> str:
    """Path of a recording of ``waves`` with a pause in seconds after each."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [np.pad(w, (0, round(p * SAMPLE_RATE))) for w, p in zip(waves, pauses, strict=True)]
    wave = np.concatenate(parts)
    target = folder / f"{hashlib.sha256(wave.tobytes()).hexdigest()[:16]}.wav"
    if not target.exists():
        write_wav(target, wave, SAMPLE_RATE)
    return str(target.resolve())


def _add_codes(base: Path, lines: Sequence[dict]) -> None:
    """Add the ids of their speech codes to all messages with audio."""
    folder = base / SPEECH_TOKENIZER_FOLDER
    offset = LanguageModelConfig.from_directory(base).token_offset
    tokenizer = SpeechCodes(
        speech_tokenizer_component(folder).load(torch.device("cpu"), torch.float32), folder
    )
    messages: dict[str, list[dict]] = {}
    for message in (message for line in lines for message in line["conversation"]):
        if message["message_type"] != "text":
            content = message["content"]
            path = content if isinstance(content, str) else content[0]
            messages.setdefault(path, []).append(message)
    for path in tqdm(messages, desc="Speech codes", unit=" sounds", disable=None):
        ids = (tokenizer.encode(load_audio(Path(path))) + offset).tolist()
        for message in messages[path]:
            message["audio_tokens"] = ids
