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

JOINED_SENTENCES = (2, 2, 3, 3, 4)
"""Numbers of sentences in a joined recording, equally likely."""

PAUSES = (0.0, 0.5)
"""Shortest and longest silence between joined sentences, in seconds."""

WRITTEN_ANSWERS = 0.25
"""Share of the questions that are also answered in text only."""

REPEATED = ("question", "dialogue")
"""Kinds of lines that appear twice, since they are learned slowly: answers have to be found."""

SEED = 3
Heard = tuple[str, str]  # path and text of a recording


def write_conversations(
    world: Path, base: Path, target: Path, joined: int = 4000, transcribed: float = 0.25
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
    drawn, chance = read_lines(world / "train.jsonl"), random.Random(SEED)
    users = sorted({item for line in drawn for item in _user_recordings(line)})
    answers = sorted({item for line in drawn for item in _answer_recordings(line)})
    spoken = [line for line in drawn if line["kind"] != "transcription"]
    others = sorted({item for line in spoken for item in _user_recordings(line)})
    heard = chance.sample(others, round(transcribed * len(others))) + answers
    train = [
        *drawn,
        *[_transcription(chance, item) for item in heard],
        *_written_answers(chance, drawn),
        *(line for line in drawn if line["kind"] in REPEATED),
        *_read_aloud(world),
    ]
    recordings = _join_sentences(chance, users, joined, target / "joined")
    train += [_transcription(chance, item) for item in recordings]
    validation = read_lines(world / "validation.jsonl")
    _add_codes(base, validation + train)
    write_json_lines(target / "validation.jsonl", validation)
    write_json_lines(target / "train.jsonl", train)  # last: when it exists, both do


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
    folder.mkdir(parents=True, exist_ok=True)
    for _ in tqdm(range(count), desc="Joining", unit=" recordings", disable=None):
        waves, texts, length = [], [], 0
        for path, text in chance.choices(heard, k=chance.choice(JOINED_SENTENCES)):
            wave, pause = load_audio(Path(path)), round(chance.uniform(*PAUSES) * SAMPLE_RATE)
            length += len(wave) + pause
            if length > SEGMENT_SAMPLES:
                break
            waves += [wave, np.zeros(pause, np.float32)]
            texts.append(text)
        wave = np.concatenate(waves)
        target = folder / f"{hashlib.sha256(wave.tobytes()).hexdigest()[:16]}.wav"
        if not target.exists():
            write_wav(target, wave, SAMPLE_RATE)
        yield str(target.resolve()), " ".join(texts)


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
