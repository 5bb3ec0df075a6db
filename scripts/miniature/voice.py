"""The answer voice: every text that the assistant says, spoken once by Kokoro.

The folder contains

    *.wav                24 kHz, 16 bit, each with its phones in a file beside it
    validation.jsonl     some of the sentences of train.jsonl, for the tokenizer
    answers_train.jsonl  sentences, and each answer AGAIN times, for the vocoder
    held_out.jsonl       sentences that are never trained on, and answers to held-out questions
    train.jsonl          sentences and answers once; written last

Lines are recordings as in a spoken world: audio, text, voice, phones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from kimia_infer.utils.files import write_json_lines
from scripts.miniature.natural import paths, phones_of, write_speech
from scripts.miniature.spoken_world import POOL, World, pool, recording_line
from scripts.miniature.voices import ANSWER_VOICE, Utterance

AGAIN = 6
"""Copies of each short answer in the vocoder's training set: they are few, and used most.

The detokenizer's set has one of each: in the voice before this one, 5,000 steps with this list came
nearer to a reference voice in 63 % of 60 answers, 4,000 steps with one of each in 90 %.
"""


def write_voice(folder: Path, world: World, answers: Iterable[str], kokoro: Path) -> None:
    """Write what is missing of the recordings for training, and the lists.

    ``answers`` are said beside the sentences that are repeated and read.
    """
    sentences = pool(world, "train", POOL["train"])
    others = sorted(set(answers) - set(sentences))
    _speak(folder, [*sentences, *others], kokoro)
    _list(folder / "answers_train.jsonl", [*sentences, *others * AGAIN])
    _list(folder / "validation.jsonl", sentences[:: max(1, len(sentences) // 20)])
    _list(folder / "train.jsonl", [*sentences, *others])


def write_references(folder: Path, world: World, answers: Iterable[str], kokoro: Path) -> None:
    """Write what is missing of the recordings that are compared with."""
    sentences = pool(world, "held_out", POOL["held_out"])
    _speak(folder, [*sentences, *sorted(set(answers) - set(sentences))], kokoro)
    _list(folder / "held_out.jsonl", sentences)


def _speak(folder: Path, texts: Sequence[str], kokoro: Path) -> None:
    write_speech(folder, [Utterance(text, ANSWER_VOICE) for text in texts], kokoro)


def _list(path: Path, texts: Sequence[str]) -> None:
    lines = []
    for text in texts:
        said = Utterance(text, ANSWER_VOICE)
        (recording,) = paths(path.parent, said)
        lines.append(recording_line(recording.name, said, phones_of(recording)))
    write_json_lines(path, lines)
