"""The training data of the miniature's language model, made from conversations of the small world.

Speech codes of every recording are computed once. The training set is augmented: recordings of
users and the assistant are also transcribed, some questions are answered in text, several sentences
are joined as in segments of a long transcription, sentences are read aloud, and kinds of
conversations that are learned slowly appear twice.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from kimia_infer.audio.files import SAMPLE_RATE, load_audio, write_wav
from kimia_infer.data.conversations import UNDERSTANDING, ConversationFile
from kimia_infer.models.kimi_audio.checkpoint import SPEECH_TOKENIZER_FOLDER
from kimia_infer.models.kimi_audio.config import LanguageModelConfig
from kimia_infer.models.kimi_audio.speech_tokenizer import SpeechCodes, speech_tokenizer_component
from kimia_infer.models.kimi_audio.whisper import SEGMENT_SAMPLES
from kimia_infer.utils.files import write_json_lines
from scripts.miniature.spoken_world import READ, SPOKEN, TRANSCRIBE

JOINED_SENTENCES = (2, 2, 3, 3, 4)
"""Numbers of sentences in a joined recording, equally likely."""

PAUSES = (0.0, 0.5)
"""Shortest and longest silence between joined sentences, in seconds."""

WRITTEN_ANSWERS = 0.25
"""Share of the questions that are also answered in text only."""

REPEATED = {"question": 1, "dialogue": 1}
"""Further copies of lines of these kinds, which are learned slowly: answers have to be found."""

SEED = 3
Heard = tuple[str, str]  # path and text of a recording


def write_conversations(
    world: Path,
    base: Path,
    target: Path,
    joined: int = 4000,
    transcribed: float = 0.25,
) -> None:
    """Write validation.jsonl and train.jsonl with the ids of all speech codes to ``target``.

    Paths in them are absolute, so ``target`` must not be moved.

    Args:
        world: folder of the spoken world.
        base: checkpoint whose speech tokenizer and ids are used.
        target: folder that is written.
        joined: recordings of several sentences, added to the training set.
        transcribed: share of the users' other recordings that are also transcribed.
    """
    lines = {name: _read(world / f"{name}.jsonl", world) for name in ("validation", "train")}
    chance = random.Random(SEED)
    heard = sorted({item for line in lines["train"] for item in _user_sounds(line)})
    lines["train"] += [
        *_transcriptions(chance, lines["train"], transcribed),
        *_written_answers(chance, lines["train"]),
        *(line for line in lines["train"] for _ in range(REPEATED.get(line["kind"], 0))),
        *_read_aloud(world),
    ]
    recordings = _join_sounds(chance, heard, joined, target / "joined")
    lines["train"] += [_transcription(chance, item) for item in recordings]
    codes = _codes(
        base, [path for some in lines.values() for line in some for path in _paths(line)]
    )
    for name, some in lines.items():  # the training set last: when it exists, all do
        write_json_lines(target / f"{name}.jsonl", [_with_codes(line, codes) for line in some])


def _read(path: Path, world: Path) -> list[dict]:
    """Lines of a set, with absolute paths."""
    file = ConversationFile(path)
    lines = [file.raw(index) for index in range(len(file))]
    for line in lines:
        for message in line["conversation"]:
            content = message["content"]
            if message["message_type"] == "audio":
                message["content"] = str((world / content).resolve())
            elif message["message_type"] == "audio-text":
                message["content"] = [str((world / content[0]).resolve()), content[1]]
    return lines


def _user_sounds(line: dict) -> Iterator[Heard]:
    sounds = [m["content"] for m in line["conversation"] if m["message_type"] == "audio"]
    yield from zip(sounds, (text for text in line["said"] if text), strict=True)


def _answer_sounds(line: dict) -> Iterator[Heard]:
    for message in line["conversation"]:
        if message["message_type"] == "audio-text":
            sound, text = message["content"]
            yield sound, text


def _transcriptions(chance: random.Random, lines: Sequence[dict], part: float) -> Iterator[dict]:
    """Of a share of the users' other recordings, and of all spoken answers."""
    elsewhere = [line for line in lines if line["kind"] != "transcription"]
    others = sorted({item for line in elsewhere for item in _user_sounds(line)})
    answers = sorted({item for line in lines for item in _answer_sounds(line)})
    for item in chance.sample(others, round(part * len(others))) + answers:
        yield _transcription(chance, item)


def _transcription(chance: random.Random, heard: Heard) -> dict:
    sound, text = heard
    instruction = chance.choice(TRANSCRIBE)
    return {
        "task_type": UNDERSTANDING,
        "kind": "transcription",
        "conversation": [
            {"role": "user", "message_type": "text", "content": instruction},
            {"role": "user", "message_type": "audio", "content": sound},
            {"role": "assistant", "message_type": "text", "content": text},
        ],
    }


def _read_aloud(world: Path) -> Iterator[dict]:
    """Requests to read the sentences that were spoken in the assistant's voice."""
    file = ConversationFile(world / "voice_train.jsonl")
    for index in range(len(file)):
        sentence = file.raw(index)
        sound = str((world / sentence["audio"]).resolve())
        asked = {"role": "user", "message_type": "text", "content": READ + sentence["text"]}
        said = {
            "role": "assistant",
            "message_type": "audio-text",
            "content": [sound, sentence["text"]],
        }
        yield {"task_type": SPOKEN, "kind": "read", "conversation": [asked, said]}


def _written_answers(chance: random.Random, lines: Sequence[dict]) -> Iterator[dict]:
    """Some questions again, with answers in text only."""
    questions = [line for line in lines if line["kind"] == "question"]
    for line in chance.sample(questions, round(WRITTEN_ANSWERS * len(questions))):
        question, answer = line["conversation"]
        written = {"role": "assistant", "message_type": "text", "content": answer["content"][1]}
        yield {"task_type": UNDERSTANDING, "kind": "written", "conversation": [question, written]}


def _join_sounds(
    chance: random.Random, heard: Sequence[Heard], count: int, folder: Path
) -> Iterator[Heard]:
    """Write recordings of several sentences with pauses, of at most a segment's length.

    Names are checksums of the content, so that existing recordings keep their cached features.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for _ in tqdm(range(count), desc="Joining", unit=" recordings", disable=None):
        parts, texts, length = [], [], 0
        for sound, text in chance.choices(heard, k=chance.choice(JOINED_SENTENCES)):
            wave, pause = load_audio(Path(sound)), round(chance.uniform(*PAUSES) * SAMPLE_RATE)
            length += len(wave) + pause
            if length > SEGMENT_SAMPLES:
                break
            parts += [wave, np.zeros(pause, np.float32)]
            texts.append(text)
        wave = np.concatenate(parts)
        path = folder / f"{hashlib.sha256(wave.tobytes()).hexdigest()[:16]}.wav"
        if not path.exists():
            write_wav(path, wave, SAMPLE_RATE)
        yield str(path.resolve()), " ".join(texts)


def _paths(line: dict) -> Iterator[str]:
    for message in line["conversation"]:
        if message["message_type"] == "audio":
            yield message["content"]
        elif message["message_type"] == "audio-text":
            yield message["content"][0]


def _codes(base: Path, paths: Sequence[str]) -> dict[str, list[int]]:
    """Ids of the speech codes of every recording."""
    folder, offset = (
        base / SPEECH_TOKENIZER_FOLDER,
        LanguageModelConfig.from_directory(base).token_offset,
    )
    tokenizer = SpeechCodes(
        speech_tokenizer_component(folder).load(torch.device("cpu"), torch.float32), folder
    )
    paths = sorted(set(paths))
    return {
        path: (tokenizer.encode(load_audio(Path(path))) + offset).tolist()
        for path in tqdm(paths, desc="Speech codes", unit=" sounds", disable=None)
    }


def _with_codes(line: dict, codes: dict[str, list[int]]) -> dict:
    messages = []
    for message in line["conversation"]:
        content = message["content"]
        if message["message_type"] == "audio":
            message = {**message, "audio_tokens": codes[content]}
        elif message["message_type"] == "audio-text":
            message = {**message, "audio_tokens": codes[content[0]]}
        messages.append(message)
    return {**line, "conversation": messages}
