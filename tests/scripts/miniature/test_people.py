"""People of the small world: who they are, and how their speech is cut and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from kimia_infer.api.events import WordTime
from kimia_infer.audio.files import load_audio
from kimia_infer.data.conversations import ConversationFile
from scripts.miniature import natural
from scripts.miniature.natural import Spoken, WordList, as_said, paths, phones_of
from scripts.miniature.people import (
    KINDS,
    READERS,
    SETS,
    PeopleSize,
    draw_people,
    question_words,
    word_lists,
    write_people,
)
from scripts.miniature.voices import (
    ACCENTS,
    ANSWER_VOICE,
    ENGLISH,
    HELD_OUT_ENGLISH,
    Person,
    Utterance,
)
from scripts.miniature.world import core, whole


def voices(name: str) -> set[str]:
    """Kokoro's voices that the users of a set have, also in mixtures."""
    drawn = {task.voice.name for task in draw_people(whole, name, 300, 1)}
    return {part.split(":")[0] for voice in drawn for part in voice.split("+")}


def test_held_out_people_and_texts_are_in_no_other_set():
    assert voices("held_out") == set(HELD_OUT_ENGLISH)
    assert set(ENGLISH) < voices("train") <= {*ENGLISH, *ACCENTS}
    assert not voices("validation") & set(HELD_OUT_ENGLISH)
    assert not set(HELD_OUT_ENGLISH) & set(READERS)
    texts = {
        name: {
            task.turns
            for task in draw_people(core, name, 300, 1)
            if task.kind not in ("unknown", "sound")
        }
        for name in SETS
    }
    assert len(texts["held_out"]) > 200
    assert not texts["train"] & (texts["held_out"] | texts["validation"])
    assert {task.kind for task in draw_people(whole, "train", 100, 1)} == KINDS.keys()
    assert draw_people(whole, "train", 300, 1)[:50] == draw_people(whole, "train", 50, 1)


def test_lists_have_every_word_once():
    lists = list(word_lists(("af_heart", "am_adam"), 1))
    for voice in ("af_heart", "am_adam"):
        words = [word for listed in lists if listed.voice == voice for word in listed.words]
        assert sorted(words) == question_words()
    assert {"plus", "monday", "spider"} < set(question_words()) < set(whole.vocabulary())


SECONDS = 2.0


def spoken(kokoro: object, text: str, person: Person) -> Spoken:
    """A ramp at 24 kHz, whose value is the time; a word every 0.4 s, of 0.2 s."""
    words = text.replace(",", "").split()
    times = [WordTime(w, 0.4 * (1 + i), 0.4 * (1 + i) + 0.2) for i, w in enumerate(words)]
    wave = np.arange(int(SECONDS * 24_000)) / (SECONDS * 24_000)
    return Spoken(wave, times, [(time.text[0], time.start) for time in times])


@pytest.fixture
def ramps(monkeypatch) -> None:
    """Speech in this process, by nobody."""
    monkeypatch.setattr(natural, "_spoken", spoken)
    monkeypatch.setattr(natural, "_loaded", lambda kokoro: None)


def test_words_are_cut_out_with_little_around_them(tmp_path: Path, ramps: None):
    listed = WordList(("one", "two", "three"), "af_heart")
    natural._write(tmp_path, Path(), listed)
    for index, path in enumerate(paths(tmp_path, listed)):
        wave = SECONDS * load_audio(path)
        assert wave[0] == pytest.approx(0.4 * (1 + index) - natural.BEFORE, abs=1e-3)
        # The pause between two words is 0.2 s, of which each has at most a half.
        after = natural.AFTER if index == 2 else 0.1
        assert wave[-1] == pytest.approx(0.4 * (1 + index) + 0.2 + after, abs=1e-3)
    said = Utterance("one two", Person("af_bella", 1.0))
    natural._write(tmp_path, Path(), said)
    (path,) = paths(tmp_path, said)
    assert phones_of(path) == [("o", natural.BEFORE), ("t", 0.4 + natural.BEFORE)]
    wave = SECONDS * load_audio(path)
    assert wave[[0, -1]] == pytest.approx([0.4 - natural.BEFORE, 1.0 + natural.AFTER], abs=1e-3)


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

    monkeypatch.setattr(natural, "ProcessPoolExecutor", Here)
    size = PeopleSize(train=4, validation=2, held_out=3, readers=1)
    write_people(tmp_path, size, whole, Path())
    first, last = list(made), paths(tmp_path, made[-1])
    write_people(tmp_path, size, whole, Path())
    assert made == first
    last[0].unlink()  # as if interrupted
    write_people(tmp_path, size, whole, Path())
    assert made == [*first, first[-1]] and last[0].is_file()
    for name in SETS:
        file = ConversationFile(tmp_path / f"{name}.jsonl")
        assert len(file) == getattr(size, name)
        for conversation in file:
            for message in conversation.messages:
                if message.role == "user" and message.audio is not None:
                    assert (tmp_path / message.audio).is_file()
    assert ANSWER_VOICE not in {item.voice for item in made}


def test_what_is_said_for_a_text():
    """Letters are named; the assistant reads as written, users hesitate now and then."""
    assert as_said(Utterance("c a t", ANSWER_VOICE)) == "c, [a](/ˈA/), t."
    assert as_said(Utterance("one red cup", ANSWER_VOICE)) == "one red cup."
    people = [Person("af_bella", round(0.8 + 0.001 * i, 3)) for i in range(300)]
    said = [as_said(Utterance("one red cup", person)) for person in people]
    assert {one[-1] for one in said} == {"p", ".", "?"}
    assert 0.06 < sum("," in one for one in said) / len(said) < 0.2
    assert any(", um, " in one for one in said)
    assert all(one.startswith("one") and "red" in one for one in said)
