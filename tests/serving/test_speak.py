"""``task=speak`` and ``speaker`` of the Cog predictors, as they answer them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kimia_infer.api.events import AudioChunk, Completion
from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.kokoro import Kokoro
from kimia_infer.api.request import Deadline
from kimia_infer.serving.cog.inputs import parse_inputs, respond
from kimia_infer.utils.errors import RequestError, RequestTimeout
from tests.models.kokoro.tiny import narrow_kokoro
from tests.paths import MINI

TEXT = "Hello there, my friend. How are you today?"
SPEAK: dict[str, Any] = {"task": "speak", "text": TEXT, "seed": 1, "speaker": "kokoro:am_adam"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KimiAudio]:
    with narrow_kokoro(tmp_path_factory.mktemp("kokoro")) as kokoro:
        yield KimiAudio(str(MINI), device="cpu", kokoro=kokoro)


def test_a_text_in_a_voice_of_kokoro(model: KimiAudio) -> None:
    *chunks, last = respond(model, parse_inputs(SPEAK))
    assert isinstance(last, Completion) and last.text == TEXT
    assert [type(chunk) for chunk in chunks] == [AudioChunk] * 2
    assert torch.equal(last.wav[0], torch.cat([chunk.wav for chunk in chunks]))
    assert isinstance(model.kokoro, Kokoro)
    assert torch.equal(last.wav, model.kokoro.speak(TEXT, "am_adam", seed=1).wav)
    assert last.metrics["seed"] == 1 and last.sample_rate == 24_000
    fast = list(respond(model, parse_inputs(SPEAK | {"speed": 2})))[-1]
    assert fast.wav.shape[1] < last.wav.shape[1]


def test_a_text_in_the_voice_of_the_model(model: KimiAudio) -> None:
    given = {"task": "speak", "text": "anna has a blue key", "seed": 2}
    *chunks, last = respond(model, parse_inputs(given))
    assert isinstance(last, Completion) and last.metrics["speech_codes"] > 0
    assert torch.equal(last.wav[0], torch.cat([chunk.wav for chunk in chunks]))
    assert last.metrics["seed"] == 2


def test_an_answer_in_a_voice_of_kokoro(model: KimiAudio) -> None:
    question = Path("scripts/question.wav").resolve()
    inputs = parse_inputs({"audio": question, "seed": 1, "speaker": "kokoro:af_heart"})
    last = list(respond(model, inputs))[-1]
    assert last.text == "nine" and last.codes == [] and last.wav.shape[1] > 6_000


@pytest.mark.parametrize("given", [SPEAK, {"text": "how are you"}], ids=["speak", "chat"])
def test_the_end_of_the_time_is_told_as_such(model: KimiAudio, given: dict[str, Any]) -> None:
    with pytest.raises(RequestTimeout, match="not complete within 1e-06 s"):
        list(respond(model, parse_inputs(given), deadline=Deadline(1e-6)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"text": " "}, "text: nothing to read aloud; give a text"),
        ({"audio": Path("a.wav")}, "audio: not used to read a text aloud; leave it out"),
        ({"history": "[]"}, "history: not used to read a text aloud; leave it out"),
        ({"output_type": "text"}, "output_type: what is read aloud is speech; leave it out"),
        ({"voice": Path("a.wav")}, "voice: a speaker of Kokoro has its own"),
        ({"speaker": "", "speed": 2}, "speed: the model itself speaks at 1.0"),
        ({"task": "transcribe", "audio": Path("a.wav")}, "speaker: not used for transcription"),
    ],
)
def test_what_is_refused(model: KimiAudio, given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=f"^{message}"):
        list(respond(model, parse_inputs(SPEAK | given)))
