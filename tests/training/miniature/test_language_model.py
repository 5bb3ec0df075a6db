"""The stages of the miniature's language model: data, checkpoints, answers and ablations."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.loading import load_stages
from kimia_infer.audio.load import load_audio
from kimia_infer.language_model.config import LanguageModelConfig
from kimia_infer.tokenizer.speech import SpeechCodes, speech_tokenizer_part
from kimia_infer.tokenizer.text import TextTokenizer
from kimia_infer.training.conversations import ConversationFile
from kimia_infer.training.miniature.conversations import write_conversations
from kimia_infer.training.miniature.evaluation import (
    Answer,
    Case,
    agreement,
    answer,
    load_model,
    read_cases,
    right,
    spoken_right,
    transcribed,
)
from kimia_infer.training.miniature.language_model import assemble, write_base
from kimia_infer.training.miniature.spoken_world import READ, REPEAT, SETS, SPOKEN, TRANSCRIBE
from kimia_infer.training.miniature.world import vocabulary
from kimia_infer.weights.layout import WHISPER_FOLDER
from kimia_infer.weights.published import SPEECH_TOKENIZER_FOLDER
from tests.training.runs import MINI, write_sound


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "base"
    write_base(folder, MINI / SPEECH_TOKENIZER_FOLDER, MINI / WHISPER_FOLDER)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    for index in range(5):
        write_sound(folder / f"{index}.wav", 0.4 + 0.1 * index, index)
    asked = {"role": "user", "message_type": "audio", "content": "0.wav"}
    told = {"role": "assistant", "message_type": "audio-text", "content": ["3.wav", "two"]}
    written = {"role": "assistant", "message_type": "text", "content": "one red cup"}
    wanted = {"role": "user", "message_type": "text", "content": TRANSCRIBE[0]}
    heard = {"role": "user", "message_type": "audio", "content": "1.wav"}
    then = {"role": "user", "message_type": "audio", "content": "2.wav"}
    lines = [
        {"task_type": SPOKEN, "kind": "question", "said": ["what is it"],
         "conversation": [asked, told]},
        {"task_type": "understanding", "kind": "transcription", "said": ["one red cup"],
         "conversation": [wanted, heard, written]},
        {"task_type": SPOKEN, "kind": "dialogue", "said": ["what is it", "and then"],
         "conversation": [asked, told, then, told]},
    ]  # fmt: skip
    for name in SETS:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
    aloud = {"audio": "4.wav", "text": "a red cup and a blue cup"}
    (folder / "voice_train.jsonl").write_text(json.dumps(aloud) + "\n")
    return folder


def read(path: Path) -> list[dict]:
    file = ConversationFile(path)
    return [file.raw(index) for index in range(len(file))]


def test_every_word_of_the_world_is_a_token(base: Path):
    tokenizer = TextTokenizer(base)
    for word in vocabulary():
        assert len(tokenizer.encode(f" {word}")) == 1
    assert len(tokenizer.encode(" ".join(vocabulary()[:10]))) <= 12
    assert len(tokenizer.encode(REPEAT)) < 10


def test_the_base_is_whole(base: Path):
    model = KimiAudio(str(base), load_detokenizer=True)
    for part in (SPEECH_TOKENIZER_FOLDER, WHISPER_FOLDER):
        expected = load_file(MINI / part / "model.safetensors")
        found = load_file(base / part / "model.safetensors")
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    chats = [{"role": "user", "message_type": "text", "content": "hello"}]
    wav, _ = model.generate(chats, output_type="both", max_new_tokens=9)
    assert wav is None or wav.shape[0] == 1
    size = (base / "model.safetensors").stat().st_size
    assert size < 7.5e6


def test_what_is_learned(base: Path, world: Path, tmp_path: Path):
    write_conversations(world, base, tmp_path, joined=4, transcribed=1.0)
    offset = LanguageModelConfig.from_directory(base).token_offset
    folder = base / SPEECH_TOKENIZER_FOLDER
    part = speech_tokenizer_part(folder).load(torch.device("cpu"), torch.float32)
    codes = SpeechCodes(part, folder)
    lines = read(tmp_path / "train.jsonl")
    assert read(tmp_path / "validation.jsonl") == lines[:3]
    assert not (tmp_path / "held_out.jsonl").exists()
    sounds = {}
    for line in lines:
        for message in line["conversation"]:
            content = message["content"]
            if message["message_type"] == "text":
                assert "audio_tokens" not in message
                continue
            path = content[0] if message["message_type"] == "audio-text" else content
            sounds.setdefault(path, codes.encode(load_audio(Path(path))) + offset)
            assert message["audio_tokens"] == sounds[path].tolist()
    added = {}
    *again, aloud = [line for line in lines[3:] if line["task_type"] == SPOKEN]
    assert again == [lines[0], lines[2]]
    asked, said = aloud["conversation"]
    assert asked["content"] == f"{READ}a red cup and a blue cup"
    assert said["content"] == [str(world / "4.wav"), "a red cup and a blue cup"]
    for line in lines[3:]:
        if line["task_type"] == SPOKEN:
            continue
        assert line["task_type"] == "understanding"
        *_, sound, text = line["conversation"]
        added[sound["content"]] = text["content"]
    texts = {"0.wav": "what is it", "1.wav": "one red cup", "2.wav": "and then"}
    assert added[str(world / "0.wav")] == "what is it"
    assert added[str(world / "2.wav")] == "and then"
    assert added[str(world / "3.wav")] == "two"
    joined = {Path(p): text for p, text in added.items() if Path(p).parent == tmp_path / "joined"}
    assert len(joined) == 4
    for path, text in joined.items():
        wave, rest, place = load_audio(path), text, 0
        while rest:  # each sentence is heard where its text stands
            name = next(n for n, said in texts.items() if rest.startswith(said))
            rest = rest.removeprefix(texts[name]).lstrip()
            one = load_audio(world / name)
            starts = np.flatnonzero(wave[place:])
            place += int(starts[0]) - int(np.flatnonzero(one)[0])
            np.testing.assert_allclose(wave[place : place + len(one)], one, atol=1e-4)
            place += len(one)
        assert not wave[place:].any()
    before = {path: path.stat().st_mtime_ns for path in joined}
    write_conversations(world, base, tmp_path, joined=4, transcribed=1.0)
    assert {path: path.stat().st_mtime_ns for path in joined} == before
    assert read(tmp_path / "train.jsonl") == lines


def test_some_questions_are_answered_in_writing(base: Path, world: Path, tmp_path: Path):
    copy = tmp_path / "world"
    shutil.copytree(world, copy)
    question = (copy / "train.jsonl").read_text().splitlines()[0]
    (copy / "train.jsonl").write_text("\n".join([question] * 8) + "\n")
    write_conversations(copy, base, tmp_path, joined=0, transcribed=0.0)
    written = [line for line in read(tmp_path / "train.jsonl") if line["kind"] == "written"]
    assert len(written) == 2
    assert written[0]["task_type"] == "understanding"
    assert written[0]["conversation"][1] == {
        "role": "assistant", "message_type": "text", "content": "two"
    }  # fmt: skip


def test_the_assembled_miniature_has_every_part(base: Path, tmp_path: Path):
    target = tmp_path / "whole"
    assemble(base, MINI / "audio_detokenizer", MINI / "vocoder", target)
    stages = load_stages(target, True, torch.device("cpu"), torch.float32)
    expected = load_stages(MINI, True, torch.device("cpu"), torch.float32)
    for name in ("dit", "vocoder"):
        found = getattr(stages.detokenizer, name).state_dict()
        for key, value in getattr(expected.detokenizer, name).state_dict().items():
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-3)
    found = stages.language_model.state_dict()
    for name, value in load_model(base, "full").language_model.state_dict().items():
        assert torch.equal(found[name], value)


@pytest.fixture(scope="module")
def model() -> KimiAudio:
    return load_model(MINI)


def test_cases_are_what_the_service_answers(model: KimiAudio, world: Path, monkeypatch):
    cases = read_cases(world / "held_out.jsonl", world, ("question", "transcription"), 5)
    assert [(case.kind, case.text, case.spoken) for case in cases] == [
        ("question", "two", True), ("transcription", "one red cup", False),
    ]  # fmt: skip
    assert not read_cases(world / "held_out.jsonl", world, ("read",), 5)
    case = cases[1]
    _, text = model.generate(case.chats, output_type="text", max_new_tokens=400)
    assert answer(model, case).text == text
    encode = model.whisper_features.encode
    monkeypatch.setattr(model.whisper_features, "encode", lambda wave: 0 * encode(wave))
    _, text = model.generate(case.chats, output_type="text", max_new_tokens=400)
    monkeypatch.undo()
    assert answer(model, case, "features").text == text != answer(model, case).text


def test_shuffled_codes_are_the_same_codes(model: KimiAudio, world: Path, monkeypatch):
    (case,) = read_cases(world / "held_out.jsonl", world, ("transcription",), 1)
    embedded, embed = [], model.language_model.embed

    def watch(audio_ids, *rest):
        embedded.append(audio_ids[0].tolist())
        return embed(audio_ids, *rest)

    monkeypatch.setattr(model.language_model, "embed", watch)
    answer(model, case)
    answer(model, case, "codes")
    plain, shuffled = (ids for ids in embedded if len(ids) > 1)
    assert plain != shuffled
    assert sorted(plain) == sorted(shuffled)


def test_the_delay_can_be_taken_away(world: Path):
    model = load_model(MINI, audio_delay=0)
    assert model.prompt_builder.audio_delay == 0
    (case,) = read_cases(world / "held_out.jsonl", world, ("question",), 1)
    given, removed = answer(load_model(MINI), case), answer(model, case)
    assert removed.codes != given.codes


def test_the_figures():
    cases = [Case("question", [], text, True) for text in ("one two", "three", "four five six")]
    given = [("one two", (1,)), ("four", (2,)), ("four six", ())]
    answers = [Answer(text, codes, True) for text, codes in given]
    hear = {(1,): "one two", (2,): "three", (): "four six"}.__getitem__
    assert transcribed(cases, answers) == pytest.approx(2 / 6)
    assert right(cases, answers) == pytest.approx(1 / 3)
    assert agreement(answers, hear) == pytest.approx(2 / 3)
    assert spoken_right(cases, answers, hear) == pytest.approx(2 / 3)
