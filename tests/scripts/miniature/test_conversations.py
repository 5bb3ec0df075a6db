"""What the language model of the miniature learns from."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from kimia_infer.audio.files import SAMPLE_RATE, load_audio
from kimia_infer.data.conversations import ConversationFile
from kimia_infer.models.kimi_audio.checkpoint import SPEECH_TOKENIZER_FOLDER
from kimia_infer.models.kimi_audio.components import speech_tokenizer_component
from kimia_infer.models.kimi_audio.config import LanguageModelConfig
from kimia_infer.models.kimi_audio.encoders import SpeechCodes
from kimia_infer.utils.files import write_json_lines
from scripts.miniature import conversations
from scripts.miniature.conversations import Amounts, write_conversations
from scripts.miniature.spoken_world import READ, sound_message
from scripts.miniature.surroundings import Surroundings
from scripts.miniature.world.splits import Turn, split_of
from tests.training.runs import write_sound


def read(path: Path) -> list[dict]:
    file = ConversationFile(path)
    return [file.raw(index) for index in range(len(file))]


AMOUNTS = Amounts(surroundings=2, spelled=3, typed=2, short=3, long=1, transcribed=1.0)


WORDS = ("one", "plus", "two")


@pytest.fixture(autouse=True, scope="module")
def small(base: Path) -> Iterator[None]:
    """A question that is typed or joined of words, and shorter recordings.

    ``base`` is made before: its vocabulary, which is computed once, is that of all questions.
    """
    turn = Turn("one plus two", "two")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversations.whole, "questions", lambda split: {"sum": (turn,)})
        patch.setattr(conversations.whole, "question", lambda chance, split: turn)
        patch.setattr(conversations, "TYPED_UNKNOWN", 0.0)
        patch.setattr(conversations, "LISTED", 0.0)
        patch.setattr(conversations, "SHORT", (1.0, 2.0))
        patch.setattr(conversations, "LONG", (3.0, 4.0))
        yield


@pytest.fixture(scope="module")
def people(world: Path) -> Path:
    """What the users of the world say, and two voices that say its words one by one."""
    folder = world.parent / "people"
    folder.mkdir()
    for name in ("train", "validation"):
        shutil.copyfile(world / f"{name}.jsonl", folder / f"{name}.jsonl")
    for source in world.glob("*.wav"):
        shutil.copyfile(source, folder / source.name)
    entries = []
    for index, (voice, word) in enumerate(product("ab", WORDS)):
        write_sound(folder / f"w{index}.wav", 0.1 * (1 + index), index)
        entries.append({"audio": f"w{index}.wav", "text": word, "voice": voice})
    write_json_lines(folder / "words.jsonl", entries)
    return folder


@pytest.fixture(scope="module")
def written(base: Path, people: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("conversations")
    write_conversations(people.parent, base, folder, AMOUNTS)
    return folder


def users(lines: list[dict]) -> list[Path]:
    """Recordings of users, in order."""
    messages = (message for line in lines for message in line["conversation"])
    return [Path(m["content"]) for m in messages if m["message_type"] == "audio"]


def test_all_sounds_have_their_codes(base: Path, written: Path):
    offset = LanguageModelConfig.from_directory(base).token_offset
    folder = base / SPEECH_TOKENIZER_FOLDER
    part = speech_tokenizer_component(folder).load(torch.device("cpu"), torch.float32)
    codes, sounds = SpeechCodes(part, folder), {}
    for line in read(written / "train.jsonl") + read(written / "validation.jsonl"):
        for message in line["conversation"]:
            content = message["content"]
            if message["message_type"] == "text":
                assert "audio_tokens" not in message
                continue
            path = content[0] if message["message_type"] == "audio-text" else content
            sounds.setdefault(path, codes.encode(load_audio(Path(path))) + offset)
            assert message["audio_tokens"] == sounds[path].tolist()


def test_what_is_learned(world: Path, people: Path, written: Path):
    lines = read(written / "train.jsonl")
    # Of the world; of people twice; of joined words.
    talks, rest = lines[: 3 + 2 * 3 + 3], lines[3 + 2 * 3 + 3 :]
    kinds = ["question", "transcription", "dialogue"]
    assert [line["kind"] for line in talks] == [
        *kinds,
        *kinds,
        *kinds,
        *["question"] * 3,
    ]
    heard = users(talks[3:9])
    assert {path.parent for path in heard} == {written / "heard"}
    assert len(set(heard)) == 8  # each time in other surroundings
    assert not (written / "held_out.jsonl").exists()
    aloud = [line for line in rest if line["kind"] == "read"]
    assert [line["conversation"][0]["content"] for line in aloud] == [
        f"{READ}two",
        f"{READ}a red cup and a blue cup",
    ]
    typed = [line["conversation"] for line in rest if line["kind"] == "typed"]
    assert [messages[0]["content"] for messages in typed] == ["one plus two"] * 2
    assert all(messages[1]["content"][1] == "two" for messages in typed)
    texts = {
        line["conversation"][-1]["content"] for line in rest if line["kind"] == "transcription"
    }
    assert {"what is it", "and then", "two"} <= texts
    said = dict(pair for line in talks for pair in zip(users([line]), line["said"], strict=True))
    said |= {
        Path(line["conversation"][-1]["content"][0]): two
        for line, two in zip(aloud, ("two", "a red cup and a blue cup"), strict=True)
    }
    alone = [line for line in rest if line["kind"] == "transcription"]
    alone = alone[: -AMOUNTS.short - AMOUNTS.long]
    assert len(alone) > 4
    for line in alone:
        assert said[users([line])[0]] == line["conversation"][-1]["content"]
    assert len(read(written / "validation.jsonl")) == 6
    written_answers = [line for line in rest if line["kind"] == "written"]
    assert len(written_answers) == 1
    assert written_answers[0]["conversation"][1] == {
        "role": "assistant", "message_type": "text", "content": "two"
    }  # fmt: skip


def test_sentences_and_words_are_joined_with_pauses(people: Path, written: Path):
    lines = read(written / "train.jsonl")
    pairs = {p: line["conversation"][-1] for line in lines for p in users([line])}
    joined = {p: m["content"] for p, m in pairs.items() if p.parent == written / "joined"}
    assert len(joined) == 4
    said = ("what is it", "one red cup", "and then", "one plus two")
    for text in joined.values():
        assert sum(text.count(one) * len(one.split()) for one in said) == len(text.split())
        assert 1 <= sum(text.count(one) for one in said) <= 10
    words = [load_audio(people / f"w{index}.wav") for index in range(6)]
    for path in (written / "spelled").iterdir():
        wave = load_audio(path)
        first = np.allclose(wave[:1600], words[0][:1600], atol=1e-4)
        voice = words[:3] if first else words[3:]
        spoken, place = np.concatenate(voice), 0
        assert len(wave) > len(spoken)
        for word in voice:  # each begins after the one before
            starts = np.lib.stride_tricks.sliding_window_view(wave[place:], 400)
            errors = np.abs(starts - word[:400]).max(1)
            assert errors.min() < 1e-3
            place += int(errors.argmin()) + len(word)


def test_joined_sentences_are_heard_where_their_texts_stand(
    base: Path, world: Path, people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(conversations, "draw_surroundings", lambda chance: Surroundings())
    write_conversations(people.parent, base, tmp_path, AMOUNTS)
    lines = read(tmp_path / "train.jsonl")
    said = (
        pair for line in lines for pair in zip(users([line]), line.get("said", ()), strict=False)
    )
    known = {path: text for path, text in said if text}
    pairs = {p: line["conversation"][-1] for line in lines for p in users([line])}
    joined = {p: m["content"] for p, m in pairs.items() if p.parent == tmp_path / "joined"}
    assert len(joined) == 4
    for path, text in joined.items():
        wave, place = load_audio(path), 0
        while text:
            place, text = behind_sentence(wave, place, text, known)
        assert not wave[place:].any()


def behind_sentence(
    wave: np.ndarray, place: int, text: str, known: dict[Path, str]
) -> tuple[int, str]:
    """Where the next sound of ``wave`` ends, and what is left of its ``text``."""
    first = place + int(np.flatnonzero(wave[place:])[0])
    for source, sentence in known.items():
        one = load_audio(source)
        begin = first - int(np.flatnonzero(one)[0])
        there = wave[begin : begin + len(one)]  # shorter than one that does not fit
        same = len(there) == len(one) and np.allclose(there, one, atol=1e-4)
        if same and text.startswith(sentence):
            return begin + len(one), text.removeprefix(sentence).lstrip()
    raise AssertionError(f"none of the recordings begins at {first}: {text}")


def test_words_are_joined_to_be_written_down(people: Path, tmp_path: Path):
    """To lists of up to four, and to no question that is held out."""
    words = conversations.people_words(people)
    listed = list(conversations._listed(random.Random(1), words, 60, tmp_path))
    assert {len(text.split()) for _, text in listed} == {1, 2, 3, 4}
    assert {word for _, text in listed for word in text.split()} == set(WORDS)
    assert all(split_of(text) == "train" for _, text in listed if len(text.split()) > 2)
    path, text = listed[0]
    assert len(load_audio(Path(path))) >= 0.1 * SAMPLE_RATE * len(text.split())


def test_a_sound_is_asked_about_in_one_recording_or_two(world: Path, tmp_path: Path):
    asked = [sound_message(str(world / "0.wav")), sound_message(str(world / "1.wav"))]
    line = {"kind": "sound", "conversation": [*asked, {"role": "assistant"}]}
    there, chance = conversations.HeardRecordings(tmp_path), random.Random(2)
    found = [there.elsewhere(chance, line, unchanged=1.0) for _ in range(30)]
    lengths = {len(one["conversation"]) for one in found}
    assert lengths == {2, 3} and len(line["conversation"]) == 3
    both = next(one for one in found if len(one["conversation"]) == 2)["conversation"][0]
    parts = [len(load_audio(Path(message["content"]))) for message in asked]
    assert len(load_audio(Path(both["content"]))) == sum(parts) + round(0.2 * SAMPLE_RATE)


def test_what_is_there_is_kept(base: Path, world: Path, people: Path, written: Path):
    lines = read(written / "train.jsonl")
    before = {path: path.stat().st_mtime_ns for path in users(lines)}
    write_conversations(people.parent, base, written, AMOUNTS)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert read(written / "train.jsonl") == lines
