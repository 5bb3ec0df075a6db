"""The predictor of Step-Audio-EditX behind the real server of Cog, with small weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kimia_infer.audio.files import wav_bytes
from kimia_infer.serving.cog.schema import read_schema, with_null
from tests.models.step_audio_editx.recorded import RECORDED
from tests.models.step_audio_editx.stand_in import write_checkpoint
from tests.paths import MINI
from tests.serving.helpers import COG_PREFIX, Server, data_uri, read_wav, serve
from tests.serving.questions import QUESTION

RATE = 16_000
VOICE = data_uri((RECORDED / "w16k.wav").read_bytes())
SHORT = data_uri(wav_bytes(0.3 * np.sin(np.arange(RATE) * 0.1), RATE))
ABSENT = ("fastapi", "limits", "prometheus_client", "multipart", "silero_vad", "uvicorn")
"""What requirements.txt has besides requirements-editx.txt, and the image has not."""


@pytest.fixture(scope="module")
def editor(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """``scripts/serve --editx`` where ``ABSENT`` are not installed; the miniature writes
    transcripts."""
    weights = tmp_path_factory.mktemp("editx")
    write_checkpoint(weights)
    directory = tmp_path_factory.mktemp("server")
    mark = directory / "absent"
    absent = f"import sys\nsys.modules.update(dict.fromkeys({ABSENT!r}))\n"
    absent += f"with open({str(mark)!r}, 'a') as file:\n    print(*sys.orig_argv, file=file)\n"
    (directory / "sitecustomize.py").write_text(absent)
    arguments = ("--editx", str(weights))
    variables = {"KIMI_AUDIO_WEIGHTS": str(MINI), "PYTHONPATH": str(directory)}
    with serve(golden, directory, *arguments, **variables) as server:
        workers = [line for line in mark.read_text().splitlines() if "coglet" in line]
        assert workers  # they run predict_editx, without these packages
        yield server
        server.kill()


def test_both_tasks(editor: Server) -> None:
    assert editor.request("GET", "/openapi.json")[1] == with_null(read_schema("EditXPredictor"))
    asked = {"audio": VOICE, "text": "ok", "transcript": "I never thought", "seed": 3}
    first, again = (editor.succeed(**asked) for _ in range(2))
    assert first["output"]["text"] == "ok" and first["output"] == again["output"]
    assert first["metrics"]["seed"] == 3 and first["metrics"]["audio_tokens"] > 0
    assert read_wav(first["output"]["audio"])[:2] == (1, 24_000)
    edited = editor.succeed(audio=SHORT, task="denoise")
    assert read_wav(edited["output"]["audio"])[2] > 0
    question = data_uri(QUESTION.read_bytes())
    heard = editor.succeed(audio=question, task="emotion", option="happy")
    assert heard["output"]["text"] == "what is four plus five"


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"text": "ok", "transcript": "a"}, "audio: expected a recording"),
        ({"audio": "/etc/hostname", "text": "ok"}, "audio: expected an uploaded file"),
        ({"audio": SHORT, "transcript": "a"}, "text: expected what to say"),
        ({"audio": SHORT, "task": "emotion", "option": "hapy"}, "did you mean 'happy'?"),
        ({"audio": SHORT, "text": "a", "option": "happy"}, "option: clone has none"),
        ({"audio": SHORT, "text": "a", "transcript": "a" * 90}, "transcript: 90 characters in"),
        ({"audio": SHORT, "text": "a" * 999, "transcript": "a"}, "text: about 1199 s of speech"),
        ({"audio": data_uri(b"no audio"), "task": "vad"}, "audio: not readable as sound"),
        ({"audio": data_uri(wav_bytes(np.zeros(9), RATE)), "task": "vad"}, "audio: 0.00 s long"),
        ({"audio": data_uri(wav_bytes(np.zeros(RATE), RATE)), "text": "a"}, "recording is silent"),
    ],
)
def test_what_cannot_be_done_is_one_line(editor: Server, inputs: dict, said: str) -> None:
    error = editor.fail(**inputs)
    assert said in error and len(error.splitlines()) == 1
    assert error.startswith(COG_PREFIX)
