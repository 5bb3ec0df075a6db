"""Sound in memory is heard like the file that holds the same samples, or refused by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kimia_infer.audio.files import SAMPLE_RATE, AudioError, load_audio
from kimia_infer.audio.memory import wav_content
from tests.audio.sounds import pcm, tone, wav

SCALES = {"int16": 2**15, "int32": 2**31, "uint8": 2**7, "float16": 1, "float32": 1, "float64": 1}
FORMS = {
    "data set": lambda array, rate: {"array": array, "sampling_rate": rate, "path": "gone.wav"},
    "pair": lambda array, rate: (array, rate),
    "decoder": lambda array, rate: SimpleNamespace(
        get_all_samples=lambda: SimpleNamespace(data=array, sample_rate=rate)
    ),
}
WHOLE_RATES = [SAMPLE_RATE, np.int64(SAMPLE_RATE), float(SAMPLE_RATE), torch.tensor(SAMPLE_RATE)]
MONO = np.zeros(100, np.float32)


def random_samples(channels: int, samples: int, kind: str) -> np.ndarray:
    """[channels, samples] over half of the range."""
    values = np.random.default_rng(samples).uniform(-0.5, 0.5, (channels, samples))
    if kind.startswith("float"):
        return values.astype(kind)
    return np.rint(values * SCALES[kind] + 128 * (kind == "uint8")).astype(kind)


def heard(array: np.ndarray) -> np.ndarray:
    """The mean of the channels of [channels, samples] in units of full scale."""
    zero = 128 if array.dtype == np.uint8 else 0
    return ((array.astype(np.float64) - zero) / SCALES[array.dtype.name]).mean(axis=0)


@given(
    channels=st.integers(1, 8),
    samples=st.integers(33, 3000),
    kind=st.sampled_from(sorted(SCALES)),
    form=st.sampled_from(sorted(FORMS)),
    layout=st.sampled_from(["first", "last", "strided", "list", "tensor", "big-endian"]),
    rate=st.sampled_from(WHOLE_RATES),
)
def test_every_form_type_and_layout(
    channels: int, samples: int, kind: str, form: str, layout: str, rate: Any
) -> None:
    array = random_samples(channels, samples, kind)
    given_array: Any = {
        "first": array,
        "last": array.T,
        "strided": np.repeat(array, 2, axis=1)[:, ::2],
        "list": array.tolist() if kind.startswith("float") else array,
        "tensor": torch.from_numpy(array).requires_grad_(kind.startswith("float")),
        "big-endian": array.astype(array.dtype.newbyteorder(">")),
    }[layout]
    if channels == 1 and samples % 2:  # [samples]
        given_array = given_array[0] if layout != "last" else given_array[:, 0]
    wave = load_audio(wav_content(FORMS[form](given_array, rate)))
    np.testing.assert_allclose(wave, heard(array), atol=2e-7)


@pytest.mark.parametrize("rate", [4_000, 8_000, 44_100, 48_000, 96_000])
def test_other_rates_are_those_of_a_file(rate: int) -> None:
    content = pcm(tone(0.5, rate))
    wave = load_audio(wav_content((np.frombuffer(content, "<i2"), rate)))
    np.testing.assert_array_equal(wave, load_audio(wav(content, rate=rate)))
    assert wave.size == SAMPLE_RATE // 2


def test_half_precision_of_pytorch() -> None:
    wave = load_audio(wav_content((torch.full((2, 50), 0.5, dtype=torch.bfloat16), SAMPLE_RATE)))
    assert wave.tolist() == [0.5] * 50


@pytest.mark.parametrize(
    ("sound", "message"),
    [
        ({"array": MONO}, "sampling_rate: missing"),
        ({"sampling_rate": 16_000}, "array: missing"),
        ({"bytes": b"", "path": "a.wav"}, "array: missing"),
        ((MONO,), "found a tuple of 1"),
        ((16_000, MONO), "the rate first; swap"),
        *(
            ((MONO, rate), "sampling_rate: expected whole hertz")
            for rate in (0, -1, 99, 44_100.5, np.nan, np.inf, "16000", True, None, 10**7, MONO)
        ),
        ((np.zeros(0), 16_000), "array: no sound in it"),
        (([], 16_000), "array: no sound in it"),
        ((np.zeros((2, 0)), 16_000), "array: no sound in it"),
        ((np.array([0, np.nan]), 16_000), "array: .*not finite"),
        ((torch.tensor([0, -torch.inf]), 16_000), "array: .*not finite"),
        ((np.array([0, 1e300]), 16_000), "array: .*not finite"),
        ((np.array([0.0, 3e4]), 16_000), "array: samples reach 30000, full scale is 1"),
        ((np.zeros((3, 2)), 16_000), r"array: which axis of the shape \[3, 2\]"),
        ((np.zeros((500, 400)), 16_000), r"array: which axis of the shape \[500, 400\]"),
        ((np.zeros((1, 2, 300)), 16_000), r"array: expected the shape .* \[1, 2, 300\]"),
        ((np.float32(1), 16_000), r"array: expected the shape .*\[\]"),
        ((np.zeros(9, np.int64), 16_000), "array: expected samples of .*int64"),
        ((np.zeros(9, complex), 16_000), "array: expected samples of .*complex"),
        ((np.zeros(9, bool), 16_000), "array: expected samples of .*bool"),
        ((["a", "b"], 16_000), "array: expected samples of"),
        (([[0.0], [0.0, 0.1]], 16_000), "array: expected a numpy array"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_sound_is_refused_by_name(sound: Any, message: str) -> None:
    with pytest.raises(AudioError, match=message):
        wav_content(sound)
