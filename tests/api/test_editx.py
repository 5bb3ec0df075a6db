"""Cloning and editing with a small checkpoint of the published layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from kimia_infer.api import editx
from kimia_infer.api.editx import Clone, Edit, EditX, longest_answer
from kimia_infer.api.events import AudioChunk, Completion
from kimia_infer.audio.files import wav_bytes
from kimia_infer.models.step_audio_editx import reference as references
from kimia_infer.models.step_audio_editx.packing import AUDIO_TOKENS, GROUP
from kimia_infer.utils.errors import RequestError
from tests.models.step_audio_editx.recorded import RECORDED, tensors
from tests.models.step_audio_editx.stand_in import short_answers

VOICE = RECORDED / "w16k.wav"
TASK = Clone("I never thought", "ok")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EditX]:
    with short_answers(tmp_path_factory.mktemp("editx")) as root:
        yield EditX(root, "cpu")


@pytest.fixture(scope="module")
def cloned(model: EditX) -> list[AudioChunk | Completion]:
    return list(model.stream(VOICE, TASK, seed=3))  # pyrefly: ignore[bad-return]


def test_a_clone_is_sound_and_its_whole(cloned: list[AudioChunk | Completion]) -> None:
    *chunks, last = cloned
    assert isinstance(last, Completion) and all(isinstance(c, AudioChunk) for c in chunks)
    assert last.wav is not None and last.text == "ok" and last.sample_rate == 24_000
    assert torch.equal(torch.cat([chunk.wav for chunk in chunks]), last.wav[0])
    assert len(last.codes) % GROUP == 0 and last.wav.shape[1] == len(last.codes) // GROUP * 2880
    assert all(0 <= token < AUDIO_TOKENS for token in last.codes)
    assert last.wav.isfinite().all() and last.wav.abs().max() > 0.01
    assert last.metrics["stop_reason"] in ("end", "limit")
    assert (last.metrics["stop_reason"] == "limit") == bool(last.notes)


def test_sound_begins_while_tokens_are_generated(
    model: EditX, cloned: list[AudioChunk | Completion], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(editx, "SLOWEST", 2.0)
    whole = model.clone(VOICE, TASK.text, TASK.target, seed=3)
    checks = 0

    def check() -> None:
        nonlocal checks
        checks += 1

    seen = [(event, checks) for event in model.stream(VOICE, TASK, seed=3, check=check)]
    *chunks, (last, _) = seen
    assert isinstance(last, Completion) and last.codes == whole.codes and len(chunks) > 1
    assert last.wav is not None and whole.wav is not None and last.wav.shape == whole.wav.shape
    assert chunks[0][1] < len(last.codes)
    assert "first_audio_seconds" in last.metrics
    loudness = [
        wave[0].unfold(0, 480, 480).square().mean(1).sqrt() for wave in (last.wav, whole.wav)
    ]
    assert (loudness[0] - loudness[1]).abs().mean() < 0.5 * loudness[1].mean()


def test_a_seed_gives_the_same_again(model: EditX, cloned: list[AudioChunk | Completion]) -> None:
    first = cloned[-1].wav
    assert first is not None
    again = model.clone(VOICE.read_bytes(), TASK.text, TASK.target, seed=3)
    other = model.clone(VOICE, TASK.text, TASK.target, seed=4)
    assert again.wav is not None and torch.equal(again.wav, first)
    assert other.codes != again.codes


def test_an_edit_is_bounded_by_its_recording(model: EditX) -> None:
    edited = model.edit(RECORDED / "w24k_stereo.wav", Edit("denoise"), seed=1)
    assert edited.wav is not None and edited.metrics["prompt_tokens"] > 100
    assert len(edited.codes) <= (0.4 * 2.9 + 0.4) * 42


def test_a_reference_has_the_recorded_codes_and_is_read_once(
    model: EditX, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = references.ReferenceReader(model.networks)
    found = reader.read(VOICE, print)
    vq02 = [token for place, token in enumerate(found.tokens) if place % GROUP < 2]
    assert vq02 == tensors("vq02_golden")["w16k.ids"].tolist()[: len(vq02)]
    assert found.mel.shape == (2 * len(found.rows), 80)
    monkeypatch.setattr(editx, "SLOWEST", 3.0)
    long, short = (longest_answer(Clone("ab", said), found, 8000) for said in ("abab", "ab"))
    assert long > short and longest_answer(Clone("ab", "abab"), found, 202) == 200
    monkeypatch.setattr(references, "flow_rows", lambda tokens: pytest.fail("read again"))
    assert reader.read(VOICE.read_bytes(), print) is found


def sound(seconds: float, rate: int = 16_000, level: float = 0.3) -> bytes:
    wave = level * np.sin(np.arange(round(seconds * rate)) * 0.1)
    return wav_bytes(wave, rate)


REFUSED: list[tuple[Callable[[], bytes], Clone | Edit, str]] = [
    (lambda: sound(30.1), TASK, "^audio: longer than the permitted 30 s"),
    (lambda: sound(0.4), TASK, r"^audio: 0\.40 s long; send 0\.5 to 30 s"),
    (lambda: sound(2, level=0), TASK, "^audio: the recording is silent"),
    (lambda: sound(2, 8_000), TASK, "^audio: recorded at 8000 Hz.* at least 16000 Hz"),
    (lambda: b"no audio", TASK, "^audio: "),
    (lambda: sound(2), Clone("a" * 200, "b"), r"^text: 200 characters in 2\.\d s of speech"),
    (lambda: sound(2), Clone("a", "b" * 200), r"^target: about 4\d\d s of speech, more than"),
    (lambda: sound(2), Clone("a", " "), "^target: expected some text"),
    (lambda: sound(2), Clone("", "a"), "^text: expected some text"),
    (lambda: sound(2), Edit("emotion", "hapy", "a"), "^option: .*did you mean 'happy'"),
    (lambda: sound(2), Edit("mood"), "^kind: expected one of"),
]


@pytest.mark.parametrize(("audio", "task", "message"), REFUSED)
def test_what_cannot_be_done_is_refused(
    model: EditX, audio: Callable[[], bytes], task: Clone | Edit, message: str
) -> None:
    with pytest.raises(RequestError, match=message) as error:
        list(model.stream(audio(), task))
    assert len(str(error.value).splitlines()) == 1


def test_a_seed_out_of_range_is_refused(model: EditX) -> None:
    with pytest.raises(RequestError, match=r"^seed: expected 0"):
        model.clone(VOICE, "a", "b", seed=-1)


@pytest.mark.parametrize("stage", ["vq06", "decode", "flow", "vocoder"])
def test_a_check_ends_a_request_in_every_stage(
    model: EditX, stage: str, cloned: list[AudioChunk | Completion], monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = False

    def enter(*_: object) -> None:
        nonlocal reached
        reached = True

    def check() -> None:
        if reached:
            raise RequestError("given up")

    networks = model.networks
    first_layers = {
        "vq06": networks.vq06,
        "decode": networks.language_model.model.norm,
        "flow": networks.flow.encoder,
        "vocoder": networks.vocoder.conv_pre,
    }
    monkeypatch.setattr(model, "_references", references.ReferenceReader(networks))
    hook = first_layers[stage].register_forward_pre_hook(enter)
    calls = []
    later = networks.vocoder.conv_post.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(RequestError, match="given up"):
            list(model.stream(VOICE, TASK, check=check))
    finally:
        hook.remove()
        later.remove()
    assert not calls
    again = model.clone(VOICE, TASK.text, TASK.target, seed=3)
    last = cloned[-1]
    assert again.wav is not None and last.wav is not None and torch.equal(again.wav, last.wav)


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="file missing"):
        EditX(tmp_path)
