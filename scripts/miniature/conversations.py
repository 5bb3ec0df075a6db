"""The training data of the miniature's language model, made from conversations of the small world.

The world's users are espeak-ng's, heard as they are or in some surroundings; people are heard in
several, and questions about numbers are also joined of single words. Questions are typed too, so
that far more of them are met than are spoken. Recordings of users and the assistant are
transcribed, some questions are answered in text, several sentences are joined as in segments of a
long transcription, and sentences are read aloud. Speech codes of every recording are computed once.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
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
    sound_message,
    spoken_answer,
    text_message,
)
from scripts.miniature.surroundings import Surroundings, draw_surroundings
from scripts.miniature.world import whole
from scripts.miniature.world.splits import Turn, split_of
from scripts.miniature.world.unknown import unknown

SHORT, LONG = (3.0, 9.0), (10.0, 28.0)
"""Seconds of recordings of several sentences: the shortest and longest of both sorts."""

PAUSES = (0.0, 0.5)
"""Shortest and longest silence between joined sentences, in seconds."""

WORD_PAUSES = (0.0, 0.35)
"""The same between joined words."""

HESITATION, HESITATIONS = 0.1, (0.4, 1.0)
"""Share of the pauses between words that are long, and how long they are."""

BARE_SUMS = 0.25
"""Share of the questions of joined words that are a sum or difference alone."""

LISTED = 0.3
"""Words joined at random to be transcribed, as a share of the questions of joined words."""

LIST_LENGTHS = {1: 0.4, 2: 0.15, 3: 0.15, 4: 0.3}
"""Shares of how many words these are."""

UNCHANGED = 0.4
"""Share of espeak-ng's conversations that are heard as they were synthesized."""

WRITTEN_ANSWERS = 0.15
"""Share of the questions that are also answered in text only."""

TYPED_UNKNOWN = 0.06
"""Share of the typed questions that the world has no answer to."""

AT_ONCE = 0.5
"""Share of the questions about a sound that are in one recording with it."""

FOREIGN = ("unknown", "sound")
"""Kinds that are not transcribed: their recordings have words of no world, or none."""

SEED = 3
Heard = tuple[str, str]  # path and text of a recording
Item = TypeVar("Item")


@dataclass(frozen=True)
class Amounts:
    """How much of each there is.

    Args:
        surroundings: how often each conversation of people is heard.
        spelled: questions joined of single words.
        typed: questions in writing.
        short: recordings of several sentences, and ``long`` those of up to a segment's length.
        transcribed: share of the users' other recordings that are also transcribed.
    """

    surroundings: int = 3
    spelled: int = 6000
    typed: int = 12_000
    short: int = 1500
    long: int = 1200
    transcribed: float = 0.5


def write_conversations(run: Path, base: Path, target: Path, amounts: Amounts) -> None:
    """Write validation.jsonl and train.jsonl with the ids of all speech codes to ``target``.

    Paths in them are absolute, so ``target`` must not be moved.

    Args:
        run: folder with the spoken ``world``, its ``people`` and the answer ``voice``.
        base: checkpoint whose speech tokenizer and ids are used.
        target: folder that is written.
    """
    world, people, voice = run / "world", run / "people", run / "voice"
    chance, heard_there = random.Random(SEED), HeardRecordings(target / "heard")
    drawn = read_lines(world / "train.jsonl")
    spoken = read_lines(people / "train.jsonl") * amounts.surroundings
    words, answered = people_words(people), Answers(voice)
    spelled = list(_spelled(chance, words, answered, amounts.spelled, target / "spelled"))
    lines = [
        *(heard_there.elsewhere(chance, line, UNCHANGED) for line in drawn),
        *(
            heard_there.elsewhere(chance, line)
            for line in tqdm([*spoken, *spelled], "Surroundings", disable=None)
        ),
    ]
    known = [line for line in lines if line["kind"] not in FOREIGN]
    users = sorted({item for line in known for item in _user_recordings(line)})
    others = [line for line in known if line["kind"] != "transcription"]
    others = sorted({item for line in others for item in _user_recordings(line)})
    listed = _listed(chance, words, round(LISTED * amounts.spelled), target / "spelled")
    heard = [*_some(chance, others, amounts.transcribed), *answered.recordings, *listed]
    recordings = [
        *_join_sentences(chance, users, amounts.short, SHORT, target / "joined"),
        *_join_sentences(chance, users, amounts.long, LONG, target / "joined"),
    ]
    train = [
        *lines,
        *(_transcription(chance, item) for item in heard),
        *_written_answers(chance, lines),
        *_typed(answered, amounts.typed),
        *_read_aloud(answered),
        *(_transcription(chance, item) for item in recordings),
    ]
    validation = read_lines(world / "validation.jsonl")
    validation += [
        heard_there.elsewhere(chance, line) for line in read_lines(people / "validation.jsonl")
    ]
    _add_codes(base, validation + train)
    write_json_lines(target / "validation.jsonl", validation)
    write_json_lines(target / "train.jsonl", train)  # last: when it exists, both do


class Answers:
    """The recordings of the answer voice in a folder."""

    def __init__(self, voice: Path):
        found = find_recordings(voice / "train.jsonl", voice.resolve(), needs_text=True)
        self.recordings: list[Heard] = [(str(r.path), r.text or "") for r in found]
        self._paths = {text: path for path, text in self.recordings}

    def __contains__(self, text: str) -> bool:
        return text in self._paths

    def message(self, text: str) -> dict:
        """The spoken answer; KeyError if nobody says it."""
        return spoken_answer(self._paths[text], text)


def _some(chance: random.Random, items: Sequence[Item], share: float) -> list[Item]:
    return chance.sample(items, round(share * len(items)))


class HeardRecordings:
    """Recordings in ``folder`` as they are heard in some surroundings; existing ones are kept."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def elsewhere(self, chance: random.Random, line: dict, unchanged: float = 0.0) -> dict:
        """A copy of a conversation, heard in random surroundings.

        ``unchanged`` is the probability that the recordings stay as they are. A sound that is
        asked about stays as loud as it is, with no noise beside it.
        """
        line = deepcopy(line)
        surroundings = draw_surroundings(chance)
        if line["kind"] == "sound":
            surroundings = replace(surroundings, level=None, ratio=None)
            if chance.random() < AT_ONCE:
                _say_at_once(line, self.folder)
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


def _say_at_once(line: dict, folder: Path) -> None:
    """Make one recording of a spoken question and the sound that it is about."""
    *asked, answer = line["conversation"]
    sounds = [message["content"] for message in asked if message["message_type"] == "audio"]
    if len(sounds) == 2:
        path = _write_joined([load_audio(Path(sound)) for sound in sounds], (0.2, 0.0), folder)
        line["conversation"] = [sound_message(path), answer]


Words = Mapping[str, Mapping[str, str]]
"""Recordings of single words, by their voices."""


def people_words(people: Path) -> Words:
    words: dict[str, dict[str, str]] = {}
    for entry in map(json.loads, (people / "words.jsonl").read_text("utf-8").splitlines()):
        words.setdefault(entry["voice"], {})[entry["text"]] = str(people / entry["audio"])
    return words


def _spelled(
    chance: random.Random, words: Words, answers: Answers, count: int, folder: Path
) -> Iterator[dict]:
    """Questions that are joined of words which people said alone."""
    known = set(next(iter(words.values()), ()))
    asked = {
        kind: [t for t in turns if t.answer in answers and known.issuperset(t.user.split())]
        for kind, turns in whole.questions("train").items()
    }
    shares = {kind: whole.QUESTIONS[kind] for kind, turns in asked.items() if turns}
    turns = [turn for kind in shares for turn in asked[kind]]
    bare = [turn for turn in turns if {"plus", "minus"} & set(turn.user.split()[1:3])] or turns
    for _ in range(count if turns else 0):
        (kind,) = chance.choices(list(shares), list(shares.values()))
        turn = chance.choice(bare if chance.random() < BARE_SUMS else asked[kind])
        path = _join_words(chance, chance.choice(list(words.values())), turn.user, folder)
        messages = [sound_message(path), answers.message(turn.answer)]
        said = [turn.user]
        yield {"task_type": SPOKEN, "kind": "question", "said": said, "conversation": messages}


def _listed(chance: random.Random, words: Words, count: int, folder: Path) -> Iterator[Heard]:
    """One to four words, joined at random to no question that is held out."""
    for _ in range(count if words else 0):
        voice, text = chance.choice(list(words.values())), ""
        while not text or (len(text.split()) > 2 and split_of(text) != "train"):
            (length,) = chance.choices(list(LIST_LENGTHS), list(LIST_LENGTHS.values()))
            text = " ".join(chance.choices(sorted(voice), k=length))
        yield _join_words(chance, voice, text, folder), text


def _join_words(chance: random.Random, voice: Mapping[str, str], text: str, folder: Path) -> str:
    pieces = [load_audio(Path(voice[word])) for word in text.split()]
    return _write_joined(pieces, [_pause(chance) for _ in pieces], folder)


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


def typed_turns(count: int) -> list[Turn]:
    """Questions that are typed: of all kinds of the world, as if spoken, and of none."""
    chance = random.Random(f"{SEED} typed")
    foreign = [chance.random() < TYPED_UNKNOWN for _ in range(count)]
    return [(unknown if one else whole.question)(chance, "train") for one in foreign]


def _typed(answers: Answers, count: int) -> Iterator[dict]:
    for turn in typed_turns(count):
        messages = [text_message("user", turn.user), answers.message(turn.answer)]
        yield {"task_type": SPOKEN, "kind": "typed", "conversation": messages}


def _read_aloud(answers: Answers) -> Iterator[dict]:
    """Requests to read what the assistant's voice says."""
    for path, text in answers.recordings:
        messages = [text_message("user", READ + text), spoken_answer(path, text)]
        yield {"task_type": SPOKEN, "kind": "read", "conversation": messages}


def _join_sentences(
    chance: random.Random,
    heard: Sequence[Heard],
    count: int,
    seconds: tuple[float, float],
    folder: Path,
) -> Iterator[Heard]:
    """Write recordings of several sentences with pauses, each of about a length in ``seconds``.

    Names are checksums of the content, so that existing recordings keep their cached features.
    """
    for _ in tqdm(range(count), desc="Joining", unit=" recordings", disable=None):
        waves, texts, pauses, length = [], [], [], 0.0
        wanted = chance.uniform(*seconds)
        while length < wanted:
            path, text = chance.choice(heard)
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
