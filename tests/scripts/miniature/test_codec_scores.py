"""What the recognizer is given: the original and what every part of the codec makes of it."""

from __future__ import annotations

import numpy as np
import pytest
import soxr
import torch

from kimia_infer.audio.files import SAMPLE_RATE, load_audio
from kimia_infer.audio.mel import log_mel
from kimia_infer.training.tasks.recordings import Recording
from scripts.miniature.codec_scores import Codec, score_codec
from scripts.miniature.recognizer import Heard, recall
from scripts.miniature.untrained import write_miniature
from tests.training.runs import write_sound

CODES = 20
"""More than the first chunk of a stream takes, fewer than one of a whole synthesis."""


@pytest.fixture(scope="module")
def codec(tmp_path_factory) -> Codec:
    folder = tmp_path_factory.mktemp("mini")
    write_miniature(folder)
    return Codec(folder)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Recording:
    path = tmp_path_factory.mktemp("sounds") / "a.wav"
    return Recording("here", write_sound(path, CODES * 0.08, 3), "red")


def test_versions_are_as_long_as_the_original(codec: Codec, sound: Recording):
    found = codec.versions(sound)
    assert list(found) == ["original", "vocoded", "one-shot", "streamed"]
    assert np.array_equal(found["original"], load_audio(sound.path))
    for name in ("vocoded", "one-shot", "streamed"):
        assert abs(len(found[name]) - CODES * 1280) <= 640, name
    # Other chunks begin with other noise and are faded.
    assert not np.allclose(found["one-shot"], found["streamed"][: len(found["one-shot"])])


def test_vocoded_is_from_the_true_spectrogram(codec: Codec, sound: Recording):
    wave = torch.from_numpy(load_audio(sound.path, sample_rate=24_000))
    with torch.inference_mode():
        made = codec.vocoder(log_mel(wave, codec.mel)).numpy()
    assert np.array_equal(
        codec.versions(sound)["vocoded"], soxr.resample(made, 24_000, SAMPLE_RATE)
    )


def test_every_version_is_recognized(codec: Codec, sound: Recording):
    class OriginalOnly:
        """Understands the original alone."""

        def heard(self, said: str, wave: np.ndarray) -> Heard:
            return Heard(said, said if np.array_equal(wave, load_audio(sound.path)) else "blue")

    heard = score_codec(codec, [sound, sound], OriginalOnly())
    assert {name: recall(found) for name, found in heard.items()} == {
        "original": 1.0, "vocoded": 0.0, "one-shot": 0.0, "streamed": 0.0,
    }  # fmt: skip
