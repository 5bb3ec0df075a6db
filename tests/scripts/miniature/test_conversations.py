"""What the language model of the miniature learns from."""

from __future__ import annotations

import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from kimia_infer.audio.files import load_audio
from kimia_infer.data.conversations import ConversationFile
from kimia_infer.models.kimi_audio.checkpoint import SPEECH_TOKENIZER_FOLDER
from kimia_infer.models.kimi_audio.components import speech_tokenizer_component
from kimia_infer.models.kimi_audio.config import LanguageModelConfig
from kimia_infer.models.kimi_audio.encoders import SpeechCodes
from kimia_infer.utils.files import write_json_lines
from scripts.miniature import conversations
from scripts.miniature.conversations import Amounts, write_conversations
from scripts.miniature.spoken_world import READ
from scripts.miniature.surroundings import Surroundings
from tests.training.runs import write_sound


def read(path: Path) -> list[dict]:
    file = ConversationFile(path)
    return [file.raw(index) for index in range(len(file))]


AMOUNTS = Amounts(surroundings=2, spelled=3, joined=4, transcribed=1.0)


@pytest.fixture(scope="module")
def people(world: Path, tmp_path_factory) -> Path:
    """What the users of the world say, and two voices that say its words one by one."""
    folder = tmp_path_factory.mktemp("people")
    for name in ("train", "validation"):
        shutil.copyfile(world / f"{name}.jsonl", folder / f"{name}.jsonl")
    for source in world.glob("*.wav"):
        shutil.copyfile(source, folder / source.name)
    entries = []
    for index, (voice, word) in enumerate(product("ab", ("what", "is", "it"))):
        write_sound(folder / f"w{index}.wav", 0.1 * (1 + index), index)
        entries.append({"audio": f"w{index}.wav", "text": word, "voice": voice})
    write_json_lines(folder / "words.jsonl", entries)
    return folder


@pytest.fixture(scope="module")
def written(base: Path, world: Path, people: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("conversations")
    write_conversations(world, people, base, folder, AMOUNTS)
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
    # Of the world, again what is learned slowly; of people twice; of joined words.
    talks, rest = lines[: 3 + 2 + 2 * 3 + 3], lines[3 + 2 + 2 * 3 + 3 :]
    kinds = ["question", "transcription", "dialogue"]
    assert [line["kind"] for line in talks] == [
        *kinds,
        *kinds[::2],
        *kinds,
        *kinds,
        *["question"] * 3,
    ]
    heard = users(talks[5:11])
    assert {path.parent for path in heard} == {written / "heard"}
    assert len(set(heard)) == 8  # each time in other surroundings
    assert not (written / "held_out.jsonl").exists()
    aloud = [line for line in rest if line["kind"] == "read"]
    assert [line["conversation"][0]["content"] for line in aloud] == [
        f"{READ}a red cup and a blue cup"
    ]
    texts = {
        line["conversation"][-1]["content"] for line in rest if line["kind"] == "transcription"
    }
    assert {"what is it", "and then", "two"} <= texts
    said = dict(pair for line in talks for pair in zip(users([line]), line["said"], strict=True))
    spoken = (m["content"] for line in talks for m in line["conversation"][1::2])
    said |= {Path(c[0]): c[1] for c in spoken if not isinstance(c, str)}
    alone = [line for line in rest if line["kind"] == "transcription"][: -AMOUNTS.joined]
    assert len(alone) > 4
    for line in alone:
        assert said[users([line])[0]] == line["conversation"][-1]["content"]
    assert len(read(written / "validation.jsonl")) == 6
    written_answers = [line for line in rest if line["kind"] == "written"]
    assert len(written_answers) == round(0.25 * 7)
    assert written_answers[0]["conversation"][1] == {
        "role": "assistant", "message_type": "text", "content": "two"
    }  # fmt: skip


def test_sentences_and_words_are_joined_with_pauses(people: Path, written: Path):
    lines = read(written / "train.jsonl")
    pairs = {p: line["conversation"][-1] for line in lines for p in users([line])}
    joined = {p: m["content"] for p, m in pairs.items() if p.parent == written / "joined"}
    assert len(joined) == 4
    said = ("what is it", "one red cup", "and then")
    for text in joined.values():
        assert sum(text.count(one) * len(one.split()) for one in said) == len(text.split())
        assert 2 <= sum(text.count(one) for one in said) <= 4
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
    write_conversations(world, people, base, tmp_path, AMOUNTS)
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


def test_what_is_there_is_kept(base: Path, world: Path, people: Path, written: Path):
    lines = read(written / "train.jsonl")
    before = {path: path.stat().st_mtime_ns for path in users(lines)}
    write_conversations(world, people, base, written, AMOUNTS)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert read(written / "train.jsonl") == lines
