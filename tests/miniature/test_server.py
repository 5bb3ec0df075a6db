"""The shipped miniature behind the real Cog servers."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import jiwer
import numpy as np
import pytest

from kimia_infer.audio.files import load_audio
from scripts.miniature.recognizer import SpeechRecognizer
from scripts.miniature.scoring import Case
from tests.paths import MINI
from tests.serving.helpers import Server, data_uri, serve

Cases = Callable[..., list[Case]]


@pytest.fixture(scope="module", params=["streaming", "plain"])
def mini_server(
    request: pytest.FixtureRequest,
    golden: Path,
    tmp_path_factory: pytest.TempPathFactory,
    long: bool,
) -> Iterator[Server]:
    if request.param == "plain" and not long:
        pytest.skip("recorded answers of both are compared in tests/serving; runs with --long")
    arguments = ["--stream"] if request.param == "streaming" else []
    directory = tmp_path_factory.mktemp(request.param)
    weights = {"KIMI_AUDIO_WEIGHTS": str(MINI), "KIMI_AUDIO_HEAD_ROWS": "track"}
    with serve(golden, directory, *arguments, **weights) as server:
        yield server


def inputs_of(case: Case) -> dict:
    """The request that asks a case; its sounds as data URIs."""
    *earlier, last = case.chats
    history, sounds = [], []
    for message in earlier:
        content = message["content"]
        if message["message_type"] == "audio":
            content = len(sounds)
            sounds.append(message["content"])
        elif message["message_type"] == "audio-text":
            content = [len(sounds), content[1]]
            sounds.append(message["content"][0])
        history.append({**message, "content": content})
    inputs = {"audio": sound(last["content"]), "output_type": "both" if case.spoken else "text"}
    if history:
        inputs |= {"history": json.dumps(history), "history_audio": [sound(s) for s in sounds]}
    return inputs


def sound(path: str) -> str:
    return data_uri(Path(path).read_bytes())


def understood(recognizer: SpeechRecognizer, chunks: list[dict]) -> str:
    """What the wav files of an answer say, one after the other."""
    files = [c["audio"] for c in chunks if c["audio"] is not None]
    waves = [load_audio(base64.b64decode(file.partition(",")[2])) for file in files]
    return recognizer.hear(np.concatenate(waves), "answer")


@pytest.mark.parametrize("kind", ["question", "dialogue"])
def test_spoken_answers(mini_server: Server, cases: Cases, recognizer: SpeechRecognizer, kind: str):
    found = []
    for case in cases(kind)[:6]:
        output = mini_server.succeed(**inputs_of(case))["output"]
        chunks = output if isinstance(output, list) else [output]
        text = "".join(chunk["text"] or "" for chunk in chunks)
        found += [text == case.text, understood(recognizer, chunks) == case.text]
    assert sum(found) >= 9, found


def test_transcripts(mini_server: Server, cases: Cases):
    spoken = cases("transcription")[:6]
    found = []
    for case in spoken:
        uri = sound(case.chats[-1]["content"])
        output = mini_server.succeed(task="transcribe", audio=uri)["output"]
        chunks = output if isinstance(output, list) else [output]
        found.append("".join(chunk["text"] or "" for chunk in chunks).strip())
    assert jiwer.wer([case.text for case in spoken], found) <= 0.1
