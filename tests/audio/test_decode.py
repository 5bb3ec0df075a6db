"""Sound files of every kind to waves, against recorded ones."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from kimia_infer.audio import files as load
from kimia_infer.audio.files import SAMPLE_RATE, AudioError, load_audio
from tests.audio.sounds import HUNDRED, TONE, ffmpeg, pcm, tone, wav
from tests.paths import GOLDEN

META = json.loads((GOLDEN / "audio" / "meta.json").read_text())
HASHES = json.loads((GOLDEN / "whisper" / "meta.json").read_text())
RECORDED = {
    GOLDEN / "audio" / f"{key.split('.', 1)[1]}.wav": value
    for key, value in load_file(GOLDEN / "audio" / "librosa_load_16k.safetensors").items()
} | {
    GOLDEN / "e2e" / "audio" / key.split(".", 1)[1]: value
    for key, value in load_file(GOLDEN / "e2e" / "cases.safetensors").items()
    if key.startswith("loaded_16k.")
}


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_equals_recorded_wave(path: Path) -> None:
    wave = load_audio(path)
    assert wave.dtype == np.float32
    assert wave.shape == RECORDED[path].shape
    np.testing.assert_allclose(wave, RECORDED[path], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [n for n, m in META.items() if m["sr"] == SAMPLE_RATE])
def test_sixteen_kilohertz_is_exact(name: str) -> None:
    wave = load_audio(GOLDEN / "audio" / f"{name}.wav")
    assert hashlib.sha256(wave.tobytes()).hexdigest() == HASHES[name]["sha256_float32"]


def test_plain_wav_needs_neither_torchcodec_nor_soxr(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchcodec", "torchcodec.decoders", "soxr"):
        monkeypatch.setitem(sys.modules, name, None)
    for name, about in META.items():
        path = GOLDEN / "audio" / f"{name}.wav"
        if (about["sr"], about["ch"]) == (SAMPLE_RATE, 1):
            assert load_audio(path).size == about["frames"]
        else:
            with pytest.raises(ImportError, match=r"torchcodec.*install"):
                load_audio(path)


def test_missing_resampler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soxr", None)
    with pytest.raises(ImportError, match=r"8000 Hz.*soxr"):
        load_audio(wav(pcm(tone(0.1, 8_000)), rate=8_000))


def test_both_ways_to_read_plain_wav_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    content = wav(pcm(np.random.default_rng(0).uniform(-1, 1, 5_000)))
    direct = load_audio(content)
    monkeypatch.setattr(load, "_read_pcm16", lambda *_: None)
    np.testing.assert_array_equal(load_audio(content), direct)


CONTAINERS = {
    "mp3": [],
    "flac": [],
    "ogg": [],
    "opus": [],
    "m4a": [],
    "aac": [],
    "webm": [],
    "mka": [],
    "ts": [],
    "wma": [],
    "aiff": [],
    "au": [],
    "caf": [],
    "w64": [],
    "wav": ["-c:a", "pcm_s24le"],
    "mov": ["-f", "lavfi", "-i", "testsrc=duration=2:size=32x32:rate=5", "-c:v", "mpeg4"],
}


@pytest.mark.parametrize("suffix", CONTAINERS)
def test_containers(suffix: str, source: Path, tmp_path: Path) -> None:
    """Every container gives the tone, from a name that says nothing as from its bytes."""
    made = tmp_path / f"tone.{suffix}"
    ffmpeg("-i", source, *CONTAINERS[suffix], made)
    path = made.rename(tmp_path / "upload")
    wave = load_audio(path, max_seconds=60)
    assert wave.size == pytest.approx(2 * SAMPLE_RATE, abs=0.1 * SAMPLE_RATE)
    middle = wave[SAMPLE_RATE // 2 : SAMPLE_RATE * 3 // 2]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(middle.size)))
    assert spectrum.argmax() == TONE
    assert np.abs(middle).max() == pytest.approx(0.5, abs=0.05)
    np.testing.assert_array_equal(load_audio(path.read_bytes()), wave)
    np.testing.assert_array_equal(load_audio(str(path)), wave)


def test_cover_art_is_no_sound(source: Path, tmp_path: Path) -> None:
    cover, path = tmp_path / "cover.png", tmp_path / "song.mp3"
    ffmpeg("-f", "lavfi", "-i", "color=red:size=32x32", "-frames:v", "1", cover)
    ffmpeg("-i", source, "-i", cover, "-map", "0", "-map", "1", "-c:v", "copy", path)
    assert load_audio(path).size == pytest.approx(2 * SAMPLE_RATE, abs=0.1 * SAMPLE_RATE)
    with pytest.raises(AudioError, match="no audio track"):
        load_audio(cover)


@pytest.mark.parametrize("channels", [2, 6, 8, 40])
def test_channels_are_averaged(channels: int) -> None:
    frames = np.random.default_rng(channels).uniform(-0.9, 0.9, (300, channels))
    wave = load_audio(wav(pcm(frames), channels=channels))
    np.testing.assert_allclose(wave, np.rint(frames * 32767).mean(axis=1) / 32768, atol=1e-6)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 192_000])
@pytest.mark.parametrize("frames", [1, 2, 7, 1_001])
def test_short_sounds_at_other_rates(frames: int, rate: int) -> None:
    wave = load_audio(wav(pcm(np.full(frames, 0.25)), rate=rate))
    assert wave.size == -(-frames * SAMPLE_RATE // rate)


ODD_WAVS = {
    "size zero, as written to a pipe": (wav(HUNDRED, claimed=0), 100),
    "size unknown, as written to a pipe": (wav(HUNDRED, claimed=2**32 - 1), 100),
    "truncated": (wav(HUNDRED, claimed=4_000), 100),
    "more bytes than claimed": (wav(HUNDRED, claimed=60), 30),
    "half a sample at the end": (wav(HUNDRED + b"\x01"), 100),
    "8 bit": (wav(bytes(100), bits=8), 100),
    "float": (wav(np.full(100, 0.5, "<f4").tobytes(), form=3, bits=32), 100),
    "one sample": (wav(HUNDRED[:2]), 1),
}


@pytest.mark.parametrize("case", ODD_WAVS)
def test_odd_wavs(case: str) -> None:
    content, samples = ODD_WAVS[case]
    assert load_audio(content, max_seconds=1).size == samples


def test_truncated_files_give_what_is_there(source: Path, tmp_path: Path) -> None:
    for suffix in ("mp3", "wav"):
        path = tmp_path / f"tone.{suffix}"
        ffmpeg("-i", source, "-ac", "1", path)
        content = path.read_bytes()
        wave = load_audio(content[: len(content) // 4 * 2], max_seconds=10)
        assert SAMPLE_RATE / 2 < wave.size < 3 * SAMPLE_RATE / 2
