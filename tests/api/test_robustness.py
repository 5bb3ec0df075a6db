"""Whatever the model says, and whatever fails: a clear answer or error, and then the next one."""

from __future__ import annotations

import gc
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kimia_infer.api.events import AudioChunk, Completion, TextDelta
from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.parameters import parse_parameters
from kimia_infer.audio.files import FLOOR_DBFS
from kimia_infer.utils.errors import RequestError, RequestOutOfMemory, RequestTimeout
from tests.api.sounds import noise, wav_bytes
from tests.scripted import script

CHAT = [{"role": "user", "message_type": "text", "content": "tell me about the weather"}]


def sound(content: bytes) -> dict:
    return {"role": "user", "message_type": "audio", "content": content}


@pytest.fixture(scope="module")
def model(golden: Path) -> KimiAudio:
    return KimiAudio(str(golden / "e2e" / "checkpoint"), device="cpu", dtype="float32")


def ask(model: KimiAudio, chat: list[dict] = CHAT, **arguments: object) -> Completion:
    return model.complete(chat, parse_parameters(**{"output_type": "both", "seed": 1} | arguments))


@settings(max_examples=25)
@given(data=st.data())
def test_any_two_tracks_give_an_answer(model: KimiAudio, data: st.DataObject) -> None:
    """Ids of both vocabularies in both tracks, ends anywhere, from no step to several chunks."""
    config, control = model.language_model.config, model.decoder.control
    ids = st.integers(0, config.vocab_size - 1)
    codes = st.integers(model.kimia_token_offset, config.vocab_size - 1)
    ends = st.sampled_from([control.blank, control.text_end, *control.audio_ends])
    text = data.draw(st.lists(st.one_of(ids, ends), max_size=20))
    audio = data.draw(st.lists(st.one_of(codes, codes, ids, ends), max_size=70))
    limit = data.draw(st.one_of(st.just(-1), st.integers(1, 90)))
    with pytest.MonkeyPatch.context() as patch:
        script(patch, model, text, audio)
        options = parse_parameters(output_type="both", seed=1, max_new_tokens=limit)
        *events, answer = model.respond(CHAT, options)
    assert answer.text == "".join(e.text for e in events if isinstance(e, TextDelta))
    assert answer.codes == [
        i - model.kimia_token_offset for i in answer.audio_ids if i in codes_of(model)
    ]
    waves = [e.wav for e in events if isinstance(e, AudioChunk)]
    if answer.codes:
        assert answer.audio_reason is None
        assert answer.wav.shape == (1, 1920 * len(answer.codes))
        assert torch.equal(answer.wav[0], torch.cat(waves))
    else:
        assert answer.wav is None
        assert not waves
        assert answer.audio_reason.startswith("no speech")
    ended = bool(answer.audio_ids) and answer.audio_ids[-1] in control.audio_ends
    assert answer.metrics["stop_reason"] == ("end" if ended else "limit")


def codes_of(model: KimiAudio) -> range:
    return range(model.kimia_token_offset, model.language_model.config.vocab_size)


def test_reasons_for_no_speech(model: KimiAudio, monkeypatch: pytest.MonkeyPatch) -> None:
    text = model.text_tokenizer.encode("only text")
    script(monkeypatch, model, text)
    assert "ended its speech before the first" in ask(model).audio_reason
    delay = model.language_model.config.audio_delay
    cut = ask(model, max_new_tokens=delay)
    assert f"after {delay} steps" in cut.audio_reason
    assert f"step {delay + 1}" in cut.audio_reason
    script(monkeypatch, model, text, text)
    answer = ask(model)
    assert f"none of the {len(text) + 1} ids" in answer.audio_reason
    assert answer.text == "only text"
    assert ask(model, output_type="text").audio_reason is None
    assert model.generate(CHAT, output_type="both")[0] is None


def test_one_code_is_spoken(model: KimiAudio, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, model, audio=[model.kimia_token_offset])
    answer = ask(model)
    assert answer.codes == [0]
    assert answer.text == ""
    assert answer.notes == ["the answer has no text: the model ended it before the first word"]
    assert answer.wav.shape == (1, 1920)


def test_silent_speech_is_reported(model: KimiAudio, monkeypatch: pytest.MonkeyPatch) -> None:
    text = model.text_tokenizer.encode("four")
    script(monkeypatch, model, text, [model.kimia_token_offset] * 40)
    loud = ask(model)
    assert loud.notes == []
    assert FLOOR_DBFS < loud.metrics["output_level_dbfs"] < 20
    vocoder = model.detokenizer.vocoder
    forward = vocoder.forward
    monkeypatch.setattr(vocoder, "forward", lambda mel: forward(mel) * 0)
    silent = ask(model)
    assert silent.metrics["output_level_dbfs"] == FLOOR_DBFS
    [note] = silent.notes
    assert "speech is silent" in note
    assert silent.wav.shape == loud.wav.shape


def test_silent_input_is_reported(model: KimiAudio) -> None:
    loud, silent = sound(wav_bytes(noise(1))), sound(wav_bytes(np.zeros(16_000)))
    assert ask(model, [loud], output_type="text", max_new_tokens=2).notes == []
    [note] = ask(model, [loud, silent], output_type="text", max_new_tokens=2).notes
    assert note.startswith("chats[1].content")
    assert "silent" in note


@pytest.mark.parametrize(
    ("unit", "output_type"),
    [
        (" so it goes,", "text"),
        (" so it goes,", "both"),
        ("\N{GRINNING FACE}", "text"),
        ("啊", "text"),
    ],
)
def test_loops_are_stopped_where_asked(
    model: KimiAudio, monkeypatch: pytest.MonkeyPatch, unit: str, output_type: str
) -> None:
    """Deltas that are out are never taken back, and no half character is left."""
    start, copy = (model.text_tokenizer.encode(part) for part in ("Well:", unit))
    codes = [model.kimia_token_offset + i % 7 for i in range(1000)]
    script(monkeypatch, model, start + copy * 1000, codes)
    options = parse_parameters(output_type=output_type, max_new_tokens=200, stop_repetition=True)
    *events, answer = model.respond(CHAT, options)
    assert answer.text == "Well:" + unit
    assert "".join(e.text for e in events if isinstance(e, TextDelta)) == answer.text
    assert answer.text_ids == start + copy
    assert answer.metrics["stop_reason"] == "repetition"
    assert answer.metrics["decode_steps"] < len(start) + 150
    [note] = answer.notes
    assert "copies" in note
    if output_type == "both":
        assert answer.wav.shape == (1, 1920 * len(answer.codes))
        return
    whole = ask(model, output_type="text", max_new_tokens=200)
    assert whole.metrics["stop_reason"] == "limit"
    assert len(whole.text_ids) == 200


@pytest.mark.parametrize("output_type", ["text", "both"])
def test_time_limit(model: KimiAudio, monkeypatch: pytest.MonkeyPatch, output_type: str) -> None:
    steps: list[int] = []
    launch = model.decoder._launch

    def slow() -> None:
        launch()
        if model.decoder.running[0].launched == 3:
            time.sleep(0.6)

    asked = {"output_type": output_type, "max_new_tokens": 50, "seed": 1}
    expected = model.generate(CHAT, **asked, timeout_seconds=600)
    options = parse_parameters(timeout_seconds=0.5, **asked)
    with monkeypatch.context() as patch:
        patch.setattr(model.decoder, "_launch", slow)
        with pytest.raises(RequestTimeout, match=r"timeout_seconds: .* 0\.5 s"):
            model.complete(CHAT, options, on_step=lambda done, _: steps.append(done))
    assert steps[-1] <= 3
    again = model.generate(CHAT, **asked)
    assert again[1] == expected[1]
    assert (again[0] is None) == (expected[0] is None)
    assert again[0] is None or torch.equal(again[0], expected[0])


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "soon", True])
def test_bad_time_limits(model: KimiAudio, value: object) -> None:
    with pytest.raises(RequestError, match="timeout_seconds"):
        model.generate(CHAT, timeout_seconds=value)


def test_bad_stop_repetition(model: KimiAudio) -> None:
    with pytest.raises(RequestError, match="stop_repetition"):
        model.generate(CHAT, stop_repetition="yes")


STAGES = {
    "speech codes": (lambda model: model.speech_codes.module, 0),
    "Whisper": (lambda model: model.whisper_features.module, 0),
    "prefill": (lambda model: model.language_model, 0),
    "decode": (lambda model: model.language_model, 9),
    "DiT": (lambda model: model.detokenizer.dit, 0),
    "vocoder": (lambda model: model.detokenizer.vocoder, 1),
}


HEARD = [*CHAT, sound(wav_bytes(noise(1)))]


def speak_two_chunks(monkeypatch: pytest.MonkeyPatch, model: KimiAudio) -> None:
    codes = [model.kimia_token_offset + i % 9 for i in range(40)]
    script(monkeypatch, model, model.text_tokenizer.encode("some words"), codes)


@pytest.fixture(scope="module")
def expected(model: KimiAudio) -> Completion:
    """The scripted answer to HEARD."""
    with pytest.MonkeyPatch.context() as patch:
        speak_two_chunks(patch, model)
        return ask(model, HEARD)


@pytest.mark.parametrize("stage", STAGES)
def test_out_of_memory(
    model: KimiAudio, expected: Completion, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """One clear error; everything that the request held is free when it arrives."""
    find, calls = STAGES[stage]
    module, held, made = find(model), [], []
    forward = module.forward
    speak_two_chunks(monkeypatch, model)

    def full(*arguments: object, **keywords: object) -> torch.Tensor:
        made.append(1)
        if len(made) <= calls:
            return forward(*arguments, **keywords)
        large = torch.zeros(1000)
        held.append(weakref.ref(large))
        raise torch.OutOfMemoryError(f"no room for {large.shape}\nmore lines")

    with monkeypatch.context() as patch:
        patch.setattr(module, "forward", full)
        gc.disable()  # nothing may depend on when cycles are collected
        try:
            with pytest.raises(RequestOutOfMemory, match=r"no room.*send less") as failure:
                ask(model, HEARD)
            assert held
            assert all(reference() is None for reference in held)
        finally:
            gc.enable()
    assert failure.value.__context__ is None
    assert model.decoder.room.spans.free == model.decoder.room.spans.places
    answer = ask(model, HEARD)
    assert answer.text == expected.text
    assert torch.equal(answer.wav, expected.wav)
