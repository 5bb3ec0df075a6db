"""People of the small world: who they are, and how their speech is cut and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from kimia_infer.api.events import WordTime
from kimia_infer.audio.files import SAMPLE_RATE, load_audio
from kimia_infer.data.conversations import ConversationFile
from scripts.miniature import people
from scripts.miniature.people import (
    KINDS,
    READERS,
    SETS,
    PeopleSize,
    WordList,
    draw_people,
    word_lists,
    write_people,
)
from scripts.miniature.spoken_world import ANSWER_VOICE
from scripts.miniature.voices import ACCENTS, ENGLISH, HELD_OUT_ENGLISH, Person, Utterance
from scripts.miniature.world import questions


def voices(name: str) -> set[str]:
    """Kokoro's voices that the users of a set have, also in mixtures."""
    drawn = {task.voice.name for task in draw_people(name, 300, 1)}
    return {part.split(":")[0] for voice in drawn for part in voice.split("+")}


def test_held_out_people_and_texts_are_in_no_other_set():
    assert voices("held_out") == set(HELD_OUT_ENGLISH)
    assert set(ENGLISH) < voices("train") <= {*ENGLISH, *ACCENTS}
    assert not voices("validation") & set(HELD_OUT_ENGLISH)
    assert not set(HELD_OUT_ENGLISH) & set(READERS)
    texts = {name: {task.turns for task in draw_people(name, 300, 1)} for name in SETS}
    assert len(texts["held_out"]) == 300
    assert not texts["train"] & (texts["held_out"] | texts["validation"])
    assert {task.kind for task in draw_people("train", 100, 1)} == KINDS.keys()
    assert draw_people("train", 300, 1)[:50] == draw_people("train", 50, 1)


def test_lists_have_every_word_of_the_questions_once():
    lists = list(word_lists(("af_heart", "am_adam"), 1))
    asked = {
        word for turns in questions("held_out").values() for t in turns for word in t.user.split()
    }
    for voice in ("af_heart", "am_adam"):
        words = [word for listed in lists if listed.voice == voice for word in listed.words]
        assert len(words) == len(set(words)) and asked <= set(words)


SECONDS = 2.0


def spoken(kokoro: object, text: str, person: Person) -> tuple[np.ndarray, list[WordTime]]:
    """A ramp, whose value is the time; a word every 0.4 s, of 0.2 s."""
    words = text.replace(",", "").split()
    times = [WordTime(w, 0.4 * (1 + i), 0.4 * (1 + i) + 0.2) for i, w in enumerate(words)]
    return np.arange(int(SECONDS * SAMPLE_RATE)) / (SECONDS * SAMPLE_RATE), times


@pytest.fixture
def ramps(monkeypatch) -> None:
    """Speech in this process, by nobody."""
    monkeypatch.setattr(people, "_spoken", spoken)
    monkeypatch.setattr(people, "_loaded", lambda kokoro: None)


def test_words_are_cut_out_with_little_around_them(tmp_path: Path, ramps: None):
    listed = WordList(("one", "two", "three"), "af_heart")
    people._write(tmp_path, Path(), listed)
    for index, path in enumerate(people.paths(tmp_path, listed)):
        wave = SECONDS * load_audio(path)
        assert wave[0] == pytest.approx(0.4 * (1 + index) - people.BEFORE, abs=1e-3)
        # The pause between two words is 0.2 s, of which each has at most a half.
        after = people.AFTER if index == 2 else 0.1
        assert wave[-1] == pytest.approx(0.4 * (1 + index) + 0.2 + after, abs=1e-3)
    said = Utterance("one two", Person("af_heart", 1.0))
    people._write(tmp_path, Path(), said)
    wave = SECONDS * load_audio(people.paths(tmp_path, said)[0])
    assert wave[[0, -1]] == pytest.approx([0.4 - people.BEFORE, 1.0 + people.AFTER], abs=1e-3)


def test_the_people_are_written_and_resumed(tmp_path: Path, ramps: None, monkeypatch):
    made = []

    class Here(nullcontext):
        """A pool whose only process is this one."""

        def __init__(self, *_: object, **__: object) -> None:
            super().__init__(self)

        def map(
            self, write: Callable, items: list[Utterance | WordList], chunksize: int
        ) -> Iterator[None]:
            for item in items:
                made.append(item)
                yield write(item)

    monkeypatch.setattr(people, "ProcessPoolExecutor", Here)
    size = PeopleSize(train=4, validation=2, held_out=3, readers=1)
    write_people(tmp_path, size, Path())
    first, last = list(made), people.paths(tmp_path, made[-1])
    write_people(tmp_path, size, Path())
    assert made == first
    last[0].unlink()  # as if interrupted
    write_people(tmp_path, size, Path())
    assert made == [*first, first[-1]] and last[0].is_file()
    for name in SETS:
        file = ConversationFile(tmp_path / f"{name}.jsonl")
        assert len(file) == getattr(size, name)
        for conversation in file:
            for message in conversation.messages:
                assert message.audio is None or (tmp_path / message.audio).is_file()
    assert ANSWER_VOICE not in {item.voice for item in made}
