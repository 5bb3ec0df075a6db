"""The front end against recordings of the published one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from kimia_infer.audio.files import AudioError, wav_bytes
from kimia_infer.audio.mel import MelConfig
from kimia_infer.audio.native import load_native, resample
from kimia_infer.models.step_audio_editx.frontend import (
    PROMPT_MEL,
    RATE,
    limit_level,
    prompt_mel,
    speaker_features,
    tokenizer_wave,
    trim,
    whisper_mel,
)
from tests.models.step_audio_editx.recorded import RECORDED, WAVES, recording, tensors, values


def same(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance


def test_level_is_limited() -> None:
    golden = tensors("audio_golden")
    same(limit_level(golden["loud_in"]), golden["loud_normed"], 0)
    quiet = golden["loud_in"] / 10
    same(limit_level(quiet), quiet, 0)


@pytest.mark.parametrize("name", WAVES)
def test_front_end_is_the_recorded_one(name: str) -> None:
    golden = {key.removeprefix(f"{name}."): t for key, t in tensors("audio_golden").items()}
    wave, rate = recording(name)
    wave = limit_level(wave)
    assert MelConfig.from_dict(values("audio")["mel_conf"]) == PROMPT_MEL
    same(prompt_mel(wave, rate), golden["prompt_mel"], 1e-5)
    features = speaker_features(wave, rate)
    recorded = golden.get("campplus_fbank", golden.get("campplus_fbank_first100"))
    assert recorded is not None
    # Logarithms of the energies of nearly silent frames: rounding shows in the fourth place.
    same(features[: len(recorded)], recorded, 3e-4)
    trimmed = tokenizer_wave(wave, rate)
    same(trimmed[:1500], golden["trimmed_head"], 1e-6)
    same(trimmed[-1500:], golden["trimmed_tail"], 1e-6)
    (case,) = (c for c in values("audio")["cases"] if c["wav"] == name)
    assert len(trimmed) == case["samples_trimmed"] and len(features) == case["fbank_frames"]
    mel = whisper_mel(trimmed)
    same(mel[:, :20], golden["whisper_mel128_exact_first20"], 1e-6)
    same(mel, golden["whisper_mel128"].float(), 5e-4)  # recorded in half precision


SOUNDS: dict[str, Callable[[], Tensor]] = {
    "all zero": lambda: torch.zeros(4000),
    "loud from first sample": lambda: tone(16000),
    "tone 300 samples": lambda: tone(300),
    "silence then speech": lambda: torch.cat([torch.zeros(6000), tone(8000)]),
    "speech then silence": lambda: torch.cat([tone(8000), torch.zeros(6000)]),
}


def tone(samples: int) -> Tensor:
    return 0.5 * torch.cos(0.2 * torch.arange(samples))


@pytest.mark.parametrize("case", values("audio")["trim_edges"], ids=lambda case: case["case"])
def test_trim_keeps_margins(case: dict) -> None:
    found = trim(SOUNDS[case["case"]]())
    assert len(found) == case["out"]
    first = found.nonzero()
    assert (int(first[0]) if len(first) else None) == case["first_nonzero"]


def test_resampling_is_torchaudios() -> None:
    golden = tensors("audio_golden")["w24k_stereo.resampled16k_head"]
    same(resample(*recording("w24k_stereo"), RATE)[:3000], golden, 1e-7)
    for rate, _, samples in values("audio")["resample"][1:]:
        assert len(resample(torch.ones(2000), rate, RATE)) == samples


def test_a_file_is_read_at_its_own_rate() -> None:
    for name in WAVES:
        wave, rate = load_native(RECORDED / f"{name}.wav")
        expected, stored = recording(name)
        assert rate == stored
        same(torch.from_numpy(wave), expected, 1e-7)


def test_a_header_does_not_set_the_size_of_the_filters() -> None:
    sound = 0.3 * np.sin(np.arange(100_000) / 9)
    wave, rate = load_native(wav_bytes(sound, 200_025))
    assert rate == 48_000 and len(wave) == pytest.approx(24_000, abs=60)
    with pytest.raises(AudioError, match="no sample rate of sound"):
        load_native(wav_bytes(sound, 10_000_025))
