"""Samples to files of six formats, whole and piece by piece."""

from __future__ import annotations

import wave as riff
from io import BytesIO
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from kimia_infer.audio.encode import MEDIA_TYPES, SpeechEncoder, SpeechFormat, encode
from kimia_infer.audio.files import load_audio, pcm16
from tests.audio.sounds import ffmpeg_decoded
from tests.paths import ROOT

RATE = 24_000
LONGEST_DELAY = 1_200
"""Samples that MP3 and ADTS put before the sound; their files cannot say so."""

FORMATS: tuple[SpeechFormat, ...] = get_args(SpeechFormat)
CODED: tuple[SpeechFormat, ...] = tuple(form for form in FORMATS if form != "pcm")


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    return load_audio(ROOT / "scripts" / "question.wav", sample_rate=RATE)


def pieces(wave: np.ndarray, form: SpeechFormat, size: int) -> list[bytes]:
    encoder = SpeechEncoder(form, RATE)
    return [encoder.push(wave[i : i + size]) for i in range(0, len(wave), size)] + [
        encoder.finish()
    ]


def likeness(decoded: np.ndarray, wave: np.ndarray) -> float:
    """Correlation of both, the first one as late as it fits best."""
    length = min(len(decoded), len(wave)) - LONGEST_DELAY
    delay = int(np.correlate(decoded[: length + LONGEST_DELAY], wave[:length], "valid").argmax())
    return float(np.corrcoef(decoded[delay : delay + length], wave[:length])[0, 1])


def test_every_format_has_a_media_type() -> None:
    assert set(MEDIA_TYPES) == set(FORMATS)


@pytest.mark.parametrize("form", CODED)
def test_two_readers_hear_what_was_encoded(
    form: SpeechFormat, speech: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / f"speech.{form}"
    path.write_bytes(b"".join(pieces(speech, form, 1_920)))
    [other], rate = ffmpeg_decoded([path])[path]
    ours = load_audio(path, sample_rate=rate)
    for decoded in (ours, other):
        late = len(decoded) / rate - len(speech) / RATE
        assert -1e-3 < late < 0.1
        if rate == RATE:
            assert likeness(decoded, speech) > 0.99
    assert likeness(load_audio(path, sample_rate=RATE), speech) > 0.99


@pytest.mark.parametrize("form", ["flac", "wav"])
def test_formats_without_loss_keep_every_sample(form: SpeechFormat, speech: np.ndarray) -> None:
    for content in (encode(speech, form, RATE), b"".join(pieces(speech, form, 777))):
        decoded = load_audio(content, sample_rate=RATE)
        np.testing.assert_array_equal(pcm16(decoded), pcm16(speech))


def test_pcm_is_samples_and_nothing_else(speech: np.ndarray) -> None:
    content = b"".join(pieces(speech, "pcm", 1_000))
    np.testing.assert_array_equal(np.frombuffer(content, "<i2"), pcm16(speech))


@pytest.mark.parametrize("form", FORMATS)
def test_sound_leaves_soon_after_it_came(form: SpeechFormat, speech: np.ndarray) -> None:
    """What is sent by the time of a piece decodes to all but the last 0.2 s of it."""
    parts = pieces(speech, form, RATE // 25)[:-1]
    sent = b"".join(parts[: len(parts) // 2])
    if form == "pcm":
        heard = len(sent) / 2 / RATE
    else:
        heard = len(load_audio(sent, sample_rate=RATE, note=lambda text: None)) / RATE
    assert heard > len(parts) // 2 / 25 - 0.2


@pytest.mark.parametrize("form", CODED)
def test_size_of_pieces_changes_nothing(form: SpeechFormat, speech: np.ndarray) -> None:
    one, many = (load_audio(b"".join(pieces(speech, form, n))) for n in (len(speech), 333))
    np.testing.assert_allclose(many, one, atol=1e-4)


def test_whole_wav_says_how_long_it_is_and_a_streamed_one_does_not(speech: np.ndarray) -> None:
    with riff.open(BytesIO(encode(speech, "wav", RATE))) as file:
        assert file.getnframes() == len(speech)
    streamed = b"".join(pieces(speech, "wav", 5_000))
    with riff.open(BytesIO(streamed)) as file:
        assert file.getparams()[:3] == (1, 2, RATE)
        assert file.getnframes() > 10**9
        assert file.readframes(10**9) == pcm16(speech).tobytes()


@pytest.mark.parametrize("form", FORMATS)
def test_no_sound_is_no_error(form: SpeechFormat) -> None:
    encoder = SpeechEncoder(form, RATE)
    assert isinstance(encoder.push(np.zeros(0, np.float32)) + encoder.finish(), bytes)
