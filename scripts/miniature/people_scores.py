"""How well a miniature understands people: held-out natural voices, and a real person.

Their questions are also asked in a noisy room and by telephone. Answers are greedy, and right if
their text is.
"""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.audio.files import SAMPLE_RATE, load_audio, write_wav
from scripts.miniature.people import KINDS
from scripts.miniature.real_person import QUESTIONS, person_cases, person_words, trained
from scripts.miniature.scoring import (
    Answer,
    Case,
    answer_all,
    at_a_loss,
    read_cases,
    right,
    word_errors,
)
from scripts.miniature.surroundings import Room, Surroundings

QUIET = Surroundings(before=0.2, after=0.3)
PLACES = {
    "quiet": QUIET,
    "room": replace(QUIET, room=Room(decay=0.5, distance=1.5), ratio=15.0),
    "telephone": replace(QUIET, telephone=True),
}
"""Where questions are asked; the room is noisy too, at 15 dB."""


def measure_people(model: KimiAudio, people: Path, prompts: Path) -> dict:
    """Figures as shares of 1.

    Those of the real person are of QUESTIONS sums, "person", and of the same and further sums by
    whether training has their texts, "person_trained" and "person_held_out"; "person_words" are of
    numbers, days and months to write down.

    Args:
        people: folder with ``held_out.jsonl``, see :mod:`scripts.miniature.people`.
        prompts: those of the real person.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _measure(model, people, prompts, Path(folder))


def _measure(model: KimiAudio, people: Path, prompts: Path, folder: Path) -> dict:
    cases = read_cases(people / "held_out.jsonl", tuple(KINDS), 10_000)
    voices = [case for case in cases if case.kind == "question"]
    person, figures = person_cases(prompts, folder), {}
    known, words = [trained(case) for case in person], person_words(prompts, folder)
    for place, surroundings in PLACES.items():
        figures[f"voices_{place}"] = _scores(_answers(model, voices, surroundings, folder))
        given = _answers(model, person, surroundings, folder)
        figures[f"person_{place}"] = _scores(given[:QUESTIONS])
        figures[f"person_words_{place}"] = _scores(_answers(model, words, surroundings, folder))
        for name, wanted in (("trained", True), ("held_out", False)):
            some = [a for a, is_known in zip(given, known, strict=True) if is_known == wanted]
            figures[f"person_{name}_{place}"] = _scores(some)
    for kind in sorted(KINDS.keys() - {"question"}):
        some = [case for case in cases if case.kind == kind]
        figures[f"voices_{kind}"] = _scores(_answers(model, some, QUIET, folder))
    return figures


def _answers(
    model: KimiAudio, cases: Sequence[Case], surroundings: Surroundings, folder: Path
) -> list[Answer]:
    heard = [_moved(case, surroundings, folder) for case in cases]
    return answer_all(model, heard, title="People")


def _scores(given: Sequence[Answer]) -> dict[str, float]:
    return {
        "count": len(given), "right": right(given), "word_errors": word_errors(given),
        "at_a_loss": at_a_loss(given),
    }  # fmt: skip


def _moved(case: Case, surroundings: Surroundings, folder: Path) -> Case:
    """``case`` with its recordings as they are heard there."""
    chats = []
    for message in case.chats:
        if message["message_type"] == "audio":
            source = Path(message["content"])
            path = folder / f"{surroundings.room}_{surroundings.telephone}_{source.name}"
            seed = zlib.crc32(source.name.encode())
            write_wav(path, surroundings.heard(load_audio(source), seed), SAMPLE_RATE)
            message = message | {"content": str(path)}
        chats.append(message)
    return replace(case, chats=chats)
