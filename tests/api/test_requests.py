"""What a caller gets for a request that cannot be served, and what budgets mean."""

from __future__ import annotations

import inspect
import math
import wave
from pathlib import Path

import numpy as np
import pytest

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.parameters import Parameters, parse_parameters
from kimia_infer.models.kimi_audio.prompt import parse_messages
from kimia_infer.utils.errors import RequestError

HELLO = [{"role": "user", "message_type": "text", "content": "hello"}]


@pytest.fixture(scope="module")
def model(golden: Path) -> KimiAudio:
    return KimiAudio(str(golden / "e2e" / "checkpoint"), load_detokenizer=False, device="cpu")


def test_published_signature() -> None:
    """Names, order and defaults of the published class come first; ours are keyword only."""
    constructor = inspect.signature(KimiAudio.__init__).parameters
    assert list(constructor)[1:3] == ["model_path", "load_detokenizer"]
    assert constructor["load_detokenizer"].default is True
    generate = list(inspect.signature(KimiAudio.generate).parameters.values())[1:]
    published = [p for p in generate if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert [(p.name, p.default) for p in published] == [
        ("chats", inspect.Parameter.empty),
        ("output_type", "text"),
        ("audio_temperature", 0.0),
        ("audio_top_k", 5),
        ("text_temperature", 0.0),
        ("text_top_k", 5),
        ("audio_repetition_penalty", 1.0),
        ("audio_repetition_window_size", 64),
        ("text_repetition_penalty", 1.0),
        ("text_repetition_window_size", 16),
        ("max_new_tokens", -1),
    ]
    for parameters in (constructor.values(), generate):
        extra = [p for p in parameters if p.name in ("device", "dtype", "head_rows", "seed")]
        assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in extra)


def test_without_detokenizer_speech_is_refused(model: KimiAudio) -> None:
    with pytest.raises(RequestError, match="load_detokenizer"):
        model.generate(HELLO, output_type="both")
    with pytest.raises(ValueError, match="load_detokenizer"):
        model.detokenize_audio(np.zeros(1))
    wav, text = model.generate(HELLO, max_new_tokens=3)
    assert wav is None
    assert isinstance(text, str)


@pytest.mark.parametrize(
    ("message", "where"),
    [
        ({"role": "system", "message_type": "text", "content": "x"}, r"chats\[1\]\.role.*system"),
        ({"role": "user", "content": "x"}, r"chats\[1\]\.message_type"),
        ({"role": "user", "message_type": "image", "content": "x"}, r"chats\[1\]\.message_type"),
        ({"role": "user", "message_type": "text", "content": 3}, r"chats\[1\]\.content"),
        ({"role": "user", "message_type": "audio", "content": None}, r"chats\[1\]\.content"),
        ({"role": "user", "message_type": "audio-text", "content": ["a"]}, r"chats\[1\]\.content"),
        ({"role": "user", "message_type": "audio-text", "content": ["a", 1]}, r"content\[1\]"),
        ("hello", r"chats\[1\]"),
    ],
)
def test_bad_messages_name_message_and_field(message: object, where: str) -> None:
    with pytest.raises(RequestError, match=where):
        parse_messages([*HELLO, message])


def test_missing_file_is_named_by_its_message(model: KimiAudio, tmp_path: Path) -> None:
    message = {"role": "user", "message_type": "audio", "content": str(tmp_path / "gone.wav")}
    with pytest.raises(RequestError, match=r"^chats\[1\]\.content: .*gone\.wav"):
        model.generate([*HELLO, message])


@pytest.mark.parametrize("chats", ["hello", None, 5, {"role": "user"}])
def test_chats_must_be_a_list(chats: object) -> None:
    with pytest.raises(RequestError, match="chats"):
        parse_messages(chats)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("output_type", "audio"),
        ("audio_temperature", -0.1),
        ("text_temperature", math.nan),
        ("text_temperature", "warm"),
        ("text_top_k", 2.5),
        ("audio_repetition_penalty", math.inf),
        ("text_repetition_window_size", -1),
        ("max_new_tokens", 0),
        ("max_new_tokens", -2),
        ("max_new_tokens", True),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_bad_options_name_the_argument(model: KimiAudio, name: str, value: object) -> None:
    with pytest.raises(RequestError, match=name):
        model.generate(HELLO, **{name: value})


def test_options_have_the_defaults_of_generate() -> None:
    """So that ``stream``, ``transcribe`` and the service ask for the same when told nothing."""
    generate = inspect.signature(KimiAudio.generate).parameters
    fields = Parameters.model_fields
    assert set(generate) == set(fields) | {"self", "chats", "voice", "unknown"}
    assert {n: generate[n].default for n in fields} == {n: f.default for n, f in fields.items()}


def test_top_k_beyond_the_vocabulary_matters_only_where_it_is_used(model: KimiAudio) -> None:
    with pytest.raises(RequestError, match="text_top_k"):
        model.generate(HELLO, text_top_k=10**9, text_temperature=0.5)
    assert model.generate(HELLO, text_top_k=10**9, max_new_tokens=3)


def test_whole_numbers_may_arrive_as_floats(model: KimiAudio) -> None:
    assert model.generate(HELLO, max_new_tokens=3.0) == model.generate(HELLO, max_new_tokens=3)


@pytest.mark.parametrize(("output_type", "budget"), [("text", 7500), ("both", 1500)])
def test_budgets(output_type: str, budget: int) -> None:
    options = parse_parameters(output_type=output_type)
    assert options.step_limit(100) == budget - 100
    limited = parse_parameters(output_type=output_type, max_new_tokens=7)
    assert limited.step_limit(100) == 7
    assert limited.step_limit(budget - 3) == 3
    with pytest.raises(RequestError, match=rf"needs {budget} positions.* {budget} of .* 8192"):
        options.step_limit(budget)


@pytest.mark.parametrize(
    ("seconds", "message"),
    [(600, r"\d{4} positions.*7500"), (601, r"longer than.* 600 s.* 7500 of .* 8192")],
)
def test_too_much_audio_is_refused_before_any_encoder_runs(
    model: KimiAudio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: int, message: str
) -> None:
    path = tmp_path / "long.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(bytes(2 * 16000 * seconds))
    ran = []
    monkeypatch.setattr(model.speech_codes, "encode_all", ran.append)
    monkeypatch.setattr(model.whisper_features, "encode_all", ran.append)
    chat = [{"role": "user", "message_type": "audio", "content": str(path)}]
    with pytest.raises(RequestError, match=message):
        model.generate(chat)
    assert not ran
