"""Questions of a real person: joined of prompts, asked in several places."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import av
import numpy as np
import pytest

from kimia_infer.audio.files import SAMPLE_RATE, load_audio
from kimia_infer.utils.errors import ConfigurationError
from scripts.miniature import people_scores, real_person
from scripts.miniature.people import KINDS
from scripts.miniature.people_scores import PLACES, measure_people
from scripts.miniature.real_person import (
    WORDS,
    decoded,
    fetch_prompts,
    person_cases,
    person_words,
    trained,
)
from scripts.miniature.scoring import Answer, Case
from scripts.miniature.world.core import NUMBERS, questions
from scripts.miniature.world.splits import split_of


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    """Each word a tone of its own length, in G.722."""
    folder = tmp_path_factory.mktemp("prompts")
    for index, name in enumerate(WORDS.values()):
        path = folder / f"{name}.g722"
        path.parent.mkdir(exist_ok=True)
        samples = SAMPLE_RATE // 10 + 320 * index
        wave = 0.3 * np.sin(2 * np.pi * 440 * np.arange(samples) / SAMPLE_RATE)
        with av.open(str(path), "w", format="g722") as container:
            stream = container.add_stream("g722", rate=SAMPLE_RATE, layout="mono")
            pcm = np.rint(wave * 32_767).astype(np.int16)[None]
            frame = av.AudioFrame.from_ndarray(pcm, format="s16", layout="mono")
            frame.sample_rate = SAMPLE_RATE
            for packet in [*stream.encode(frame), *stream.encode(None)]:
                container.mux(packet)
    return folder


def test_questions_are_joined_of_prompts(prompts: Path, tmp_path: Path):
    cases = person_cases(prompts, tmp_path)
    texts = [Path(case.chats[0]["content"]).stem.replace("_", " ") for case in cases]
    assert len(set(texts)) == len(texts) > real_person.QUESTIONS
    assert [trained(case) for case in cases] == [split_of(text) == "train" for text in texts]
    assert not any(trained(case) for case in cases[real_person.QUESTIONS :])
    bare = (turn.user for name in ("validation", "held_out") for turn in questions(name)["sum"])
    assert {text for text in bare if text.split()[0] in NUMBERS} <= set(texts)
    for case in cases:
        path = Path(case.chats[0]["content"])
        first, sign, second = path.stem.split("_")
        a, b = NUMBERS.index(first), NUMBERS.index(second)
        assert case.text == NUMBERS[a + b if sign == "plus" else a - b]
        speech = sum(
            len(decoded(prompts / f"{WORDS[word]}.g722")) for word in (first, sign, second)
        )
        pauses = (len(load_audio(path)) - speech) / SAMPLE_RATE - 2 * real_person.AROUND
        assert 0.2 - 0.001 <= pauses <= 0.6 + 0.001


def test_another_package_is_refused(tmp_path: Path):
    (tmp_path / real_person.ARCHIVE).write_bytes(b"!<arch>\n")
    with pytest.raises(ConfigurationError, match=r"SHA-256 .*, expected 38c5"):
        fetch_prompts(tmp_path)


def test_a_version_that_debian_does_not_have_is_named(tmp_path: Path, monkeypatch):
    command = tmp_path / "apt-get"
    command.write_text('#!/bin/sh\necho "no $2" >&2; exit 100\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(ConfigurationError, match=r"1\.6\.1-1: no asterisk.*g722=1\.6\.1-1"):
        fetch_prompts(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigurationError, match="needs Debian's apt-get"):
        fetch_prompts(tmp_path)


def test_numbers_days_and_months_are_to_be_written_down(prompts: Path, tmp_path: Path):
    assert WORDS["monday"] == "digits/day-1" and WORDS["sunday"] == "digits/day-0"
    assert WORDS["december"] == "digits/mon-11" and WORDS["ninety"] == "digits/90"
    cases = person_words(prompts, tmp_path)
    texts = {case.text for case in cases}
    assert {"monday", "january", "twenty", "nineteen"} <= texts and not cases[0].spoken
    assert sum(len(text.split()) > 2 for text in texts) == real_person.STRINGS
    assert len(load_audio(Path(cases[0].chats[1]["content"]))) > 0.4 * SAMPLE_RATE


WHO = ("voices", "person", "person_words", "person_trained", "person_held_out")


def test_figures_are_of_every_place(prompts: Path, tmp_path: Path, monkeypatch):
    asked = person_cases(prompts, tmp_path)
    voices = [replace(asked[0], kind=kind) for kind in KINDS]

    def ear(model: object, case: Case) -> Answer:
        """Understands sums, and nothing by telephone, which it knows by its name."""
        path = case.chats[0]["content"]
        return Answer(case, case.text if "_plus_" in path and "True" not in path else "none")

    monkeypatch.setattr(
        people_scores, "answer_all", lambda model, cases, title: [ear(model, c) for c in cases]
    )
    monkeypatch.setattr(people_scores, "read_cases", lambda *_: voices)
    found = measure_people(None, tmp_path, prompts)  # pyrefly: ignore[bad-argument-type]
    others = KINDS.keys() - {"question"}
    assert found.keys() == {
        *(f"{who}_{place}" for who in WHO for place in PLACES),
        *(f"voices_{kind}" for kind in others),
    }
    known = [case for case in asked if trained(case)]
    new = [case for case in asked if not trained(case)]
    written = person_words(prompts, tmp_path)
    assert found["person_words_quiet"]["count"] == len(written)
    of = {"person": asked[:40], "person_trained": known, "person_held_out": new}
    for (who, some), place in product(of.items(), PLACES):
        values = found[f"{who}_{place}"]
        assert values["count"] == len(some)
        plus = sum("_plus_" in case.chats[0]["content"] for case in some)
        assert values["right"] == (0 if place == "telephone" else plus / len(some))
