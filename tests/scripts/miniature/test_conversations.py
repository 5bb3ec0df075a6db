"""What the language model of the miniature learns from."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch

from kimia_infer.audio.files import load_audio
from kimia_infer.data.conversations import ConversationFile
from kimia_infer.models.kimi_audio.checkpoint import SPEECH_TOKENIZER_FOLDER
from kimia_infer.models.kimi_audio.components import speech_tokenizer_component
from kimia_infer.models.kimi_audio.config import LanguageModelConfig
from kimia_infer.models.kimi_audio.encoders import SpeechCodes
from scripts.miniature.conversations import write_conversations
from scripts.miniature.spoken_world import READ, SPOKEN


def read(path: Path) -> list[dict]:
    file = ConversationFile(path)
    return [file.raw(index) for index in range(len(file))]


def test_what_is_learned(base: Path, world: Path, tmp_path: Path):
    write_conversations(world, base, tmp_path, joined=4, transcribed=1.0)
    offset = LanguageModelConfig.from_directory(base).token_offset
    folder = base / SPEECH_TOKENIZER_FOLDER
    part = speech_tokenizer_component(folder).load(torch.device("cpu"), torch.float32)
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
