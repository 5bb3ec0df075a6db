"""Spoken answers for worlds of tests, by espeak-ng, whose voice answers in weights/mini."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from kimia_infer.audio.files import write_wav
from scripts.miniature.espeak import speak_all
from scripts.miniature.spoken_world import ANSWER_RATE, read_lines, resampled
from scripts.miniature.voices import Utterance, Voice

VOICE = Voice("en-us+f3", 140, 50)


def answer_texts(lists: Iterable[Path]) -> dict[Path, str]:
    """What is said in each recording of the assistant in conversations of ``lists``."""
    messages = (m for path in lists for line in read_lines(path) for m in line["conversation"])
    said = (m["content"] for m in messages if m["message_type"] == "audio-text")
    return {Path(path): text for path, text in said}


def speak_answers(texts: Mapping[Path, str]) -> None:
    """Write the recordings of ``texts``."""
    speeches = speak_all([Utterance(text, VOICE) for text in texts.values()])
    for path, speech in zip(texts, speeches, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_wav(path, resampled(speech.wave, ANSWER_RATE), ANSWER_RATE)
