"""A checkpoint whose language model is untrained, and a run with a world of five sounds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kimia_infer.models.kimi_audio.checkpoint import SPEECH_TOKENIZER_FOLDER, WHISPER_FOLDER
from scripts.miniature.assembly import write_base
from scripts.miniature.spoken_world import SETS, SPOKEN, TRANSCRIBE
from tests.paths import MINI
from tests.training.runs import write_sound


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "base"
    write_base(folder, MINI / SPEECH_TOKENIZER_FOLDER, MINI / WHISPER_FOLDER)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "world"
    folder.mkdir()
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
    voice = folder.parent / "voice"
    voice.mkdir()
    texts = {"3.wav": "two", "4.wav": "a red cup and a blue cup"}
    said = [{"audio": f"../world/{name}", "text": text} for name, text in texts.items()]
    (voice / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in said))
    return folder
