"""A complete tiny checkpoint against every recorded chat: prompt, tokens, text and wave."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kimia_infer.api.kimia import Completion, KimiAudio
from kimia_infer.audio.files import load_audio
from kimia_infer.models.kimi_audio.prompt import parse_messages
from tests.api.recorded_chats import (
    CASES,
    RECORDED,
    SET,
    chat_of,
    options_of,
    randomness_of,
)
from tests.traced import record_steps


@pytest.fixture(scope="module")
def model() -> KimiAudio:
    return KimiAudio(str(SET / "checkpoint"), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return load_file(SET / "cases.safetensors")


@pytest.fixture(scope="module")
def recorded_model() -> KimiAudio:
    """As on a GPU: recorded steps and late polls."""
    return record_steps(KimiAudio(str(SET / "checkpoint"), device="cpu", dtype="float32"))


@pytest.fixture(scope="module", params=["direct", "recorded"])
def answer(request: pytest.FixtureRequest, tensors: dict[str, torch.Tensor]):
    """Answers by case name, each computed once."""
    name = {"direct": "model", "recorded": "recorded_model"}[request.param]
    model: KimiAudio = request.getfixturevalue(name)
    known: dict[str, Completion] = {}

    def get(case: dict) -> Completion:
        if case["name"] not in known:
            known[case["name"]] = model.complete(
                chat_of(case), options_of(case), randomness_of(case, tensors)
            )
        return known[case["name"]]

    return get


@pytest.mark.parametrize("name", CASES)
def test_prompt(name: str, model: KimiAudio) -> None:
    case = CASES[name]
    prompt, features = model.encode_chat(parse_messages(chat_of(case)), options_of(case))
    expected = case["prompt"]
    assert prompt.audio_ids == expected["audio_ids"]
    assert prompt.text_ids == expected["text_ids"]
    assert prompt.is_continuous == [bool(x) for x in expected["is_continuous_mask"]]
    if not expected["feature_files"]:
        assert features is None
    else:
        assert len(features) == sum(prompt.is_continuous)


@pytest.mark.parametrize("name", CASES)
def test_answer(name: str, answer) -> None:
    case = CASES[name]
    completion = answer(case)
    assert completion.text_ids == case["text_ids"]
    assert completion.audio_ids == case["audio_ids"]
    assert completion.codes == case["codes"]
    assert completion.text == case["text"]
    assert completion.metrics["decode_steps"] == case["steps"]


@pytest.mark.parametrize(
    "name", [n for n, c in CASES.items() if c["arguments"]["output_type"] == "both"]
)
def test_wave(name: str, answer, tensors: dict[str, torch.Tensor]) -> None:
    case = CASES[name]
    wav = answer(case).wav
    if not case["codes"]:
        assert wav is None
        return
    assert wav.dtype == torch.float32
    expected = tensors[f"{name}.wav"].view(1, -1)
    torch.testing.assert_close(wav, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c["entry"] == "generate"])
def test_published_call(name: str, model: KimiAudio) -> None:
    """The published signature alone, for the runs that draw nothing."""
    case = CASES[name]
    if case.get("draws"):
        pytest.skip("sampled: generate draws from its own seed")
    wav, text = model.generate(chat_of(case), **case["arguments"])
    assert text == case["text"]
    assert (wav is None) == (not case["codes"])
    if wav is not None:
        assert wav.shape == (1, 1920 * len(case["codes"]))


def test_recorded_codes_and_features(model: KimiAudio, tensors: dict[str, torch.Tensor]) -> None:
    for name, recorded in RECORDED["audio_files"].items():
        codes = model.speech_codes.encode(load_audio(SET / "audio" / name))
        assert codes.tolist() == recorded["codes"]
        features = model.whisper_features.encode(load_audio(SET / "audio" / name))
        assert list(features.shape) == recorded["feature_shape"]
        features = features[recorded["feature_rows_stored"]]
        torch.testing.assert_close(features, tensors[f"features.{name}"], atol=1e-4, rtol=0)


def test_first_logits(model: KimiAudio, tensors: dict[str, torch.Tensor]) -> None:
    """Both full heads at the last prompt position."""
    checked = 0
    for name, case in CASES.items():
        if f"{name}.first_text_logits" not in tensors:
            continue
        prompt, features = model.encode_chat(parse_messages(chat_of(case)), options_of(case))
        language_model = model.language_model
        with torch.inference_mode():
            x = language_model.embed(
                torch.tensor([prompt.audio_ids]),
                torch.tensor([prompt.text_ids]),
                torch.tensor([prompt.is_continuous]),
                features,
            )
            hidden = language_model(x, model.decoder.attention.sequence(0, 0))
            logits = {
                "text": language_model.text_head(hidden.text[0, -1]),
                "audio": language_model.audio_head(hidden.audio[0, -1]),
            }
        for track, actual in logits.items():
            expected = tensors[f"{name}.first_{track}_logits"]
            torch.testing.assert_close(actual, expected, atol=1e-3, rtol=0)
        checked += 1
    assert checked


def test_a_seed_repeats_a_sampled_answer(model: KimiAudio) -> None:
    case = next(c for c in CASES.values() if c.get("draws") and c["codes"])
    arguments = case["arguments"] | {"max_new_tokens": 20}
    first = model.generate(chat_of(case), **arguments, seed=11)
    again = model.generate(chat_of(case), **arguments, seed=11)
    other = model.generate(chat_of(case), **arguments, seed=12)
    assert first[1] == again[1]
    assert torch.equal(first[0], again[0])
    assert first[1] != other[1] or not torch.equal(first[0], other[0])


def test_bfloat16_on_the_cpu(tensors: dict[str, torch.Tensor]) -> None:
    """The same code in bf16: a finite wave of the right length."""
    model = KimiAudio(str(SET / "checkpoint"), device="cpu", dtype="bfloat16")
    case = next(c for c in CASES.values() if c["codes"])
    completion = model.complete(chat_of(case), options_of(case))
    assert completion.codes
    assert completion.wav.shape == (1, 1920 * len(completion.codes))
    assert completion.wav.isfinite().all()
    assert model.speech_codes.module.codebook.weight.dtype == torch.float32


def test_audio_as_bytes_without_a_name(model: KimiAudio, answer) -> None:
    case = next(c for c in CASES.values() if c["messages"][-1]["message_type"] == "audio")
    chat = chat_of(case)
    chat[-1]["content"] = Path(chat[-1]["content"]).read_bytes()
    prompt, _ = model.encode_chat(parse_messages(chat), options_of(case))
    assert prompt.audio_ids == case["prompt"]["audio_ids"]
