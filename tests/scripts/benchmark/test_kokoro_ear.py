"""The comparison of Kokoro with the stock package by ear: it goes on, and its figures are right."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from scripts.benchmark import ear, kokoro, kokoro_ear
from scripts.benchmark.kokoro_ear import SENTENCES, VOICES, hear, interval, report, rows
from tests.models.kokoro.tiny import tiny_directory


def row(sentence: int, voice: str, ours: str, stock: str) -> dict[str, object]:
    return {"sentence": sentence, "voice": voice, "ours": ours, "stock": stock}


def test_hearing_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoken: list[tuple[str, str]] = []

    def way(*_: object) -> Callable[[str, str], Iterator[np.ndarray]]:
        def speak(phonemes: str, voice: str) -> Iterator[np.ndarray]:
            spoken.append((phonemes, voice))
            yield np.zeros(240, np.float32)

        return speak

    class Ear:
        def __init__(self, purpose: str) -> None:
            pass

        def words(self, wave: np.ndarray) -> str:
            return f"{len(wave)} samples"

    monkeypatch.setattr(kokoro, "ours", way)
    monkeypatch.setattr(kokoro, "stock", way)
    monkeypatch.setattr(ear, "Ear", Ear)
    monkeypatch.setattr(ear, "imported", lambda packages, purpose: {})
    monkeypatch.setattr(kokoro_ear, "SENTENCES", SENTENCES[:2])
    path = tmp_path / "journal.jsonl"
    kept = [row(0, voice, "kept", "kept") for voice in VOICES[:7]]
    path.write_text("".join(f"{json.dumps(each)}\n" for each in kept))
    hear(path, Namespace(weights=tiny_directory(tmp_path), threads=1))
    heard = rows(path)
    assert heard[:7] == kept and len(heard) == 20
    assert [each["voice"] for each in heard[7:]] == [*VOICES[7:], *VOICES]
    assert heard[-1]["ours"] == "160 samples"
    assert spoken[0::2] == spoken[1::2], "both speak the same phonemes"


def test_figures_are_those_of_the_words() -> None:
    first, second = SENTENCES[:2]  # both of seven words
    heard = [
        row(0, "af_heart", first, first),
        row(0, "bf_emma", first.replace("train", "rain"), first),
        row(1, "af_heart", second, second),
        row(1, "bf_emma", second, second),
    ]
    table = report(heard)
    assert "| `af_heart` | 2 | 14 | 0.00 | 0.00 | +0.00 |" in table
    assert "| all | 4 | 28 | 3.57 | 0.00 | +3.57 |" in table
    assert "3 of 4 clips" in table
    assert interval(heard) == (0.0, pytest.approx(100 / 14)), "from no such sentence to both"


def test_sentences_are_many_and_short() -> None:
    assert len(set(SENTENCES)) == 200
    assert all(6 <= len(sentence.split()) <= 9 for sentence in SENTENCES)
    assert not any(letter.isdigit() for letter in "".join(SENTENCES))
