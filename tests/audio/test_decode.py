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
from kimia_infer.audio.files import SAMPLE_RATE, AudioError, AudioStream, load_audio
from tests.audio.sounds import HUNDRED, ffmpeg, ffmpeg_decoded, pcm, tone, wav
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


def test_plain_wav_needs_neither_pyav_nor_soxr(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("decode", "ffmpeg"):
        monkeypatch.delitem(sys.modules, f"kimia_infer.audio.{name}", raising=False)
    for name in ("av", "soxr"):
        monkeypatch.setitem(sys.modules, name, None)
    for name, about in META.items():
        path = GOLDEN / "audio" / f"{name}.wav"
        if (about["sr"], about["ch"]) == (SAMPLE_RATE, 1):
            assert load_audio(path).size == about["frames"]
        else:
            with pytest.raises(ImportError, match=r"install the package av"):
                load_audio(path)


def test_missing_resampler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soxr", None)
    with pytest.raises(ImportError, match=r"8000 Hz.*soxr"):
        load_audio(wav(pcm(tone(0.1, 8_000)), rate=8_000))


def test_both_ways_to_read_plain_wav_agree() -> None:
    frames = pcm(np.random.default_rng(0).uniform(-1, 1, 5_000))
    both = np.repeat(np.frombuffer(frames, "<i2"), 2).tobytes()
    np.testing.assert_array_equal(load_audio(wav(both, channels=2)), load_audio(wav(frames)))


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


@pytest.mark.parametrize("suffix", ["mka", "w64"])
def test_any_number_of_channels_from_any_codec(suffix: str, tmp_path: Path) -> None:
    """Opus is decoded to a plane for each channel, PCM to one for all of them."""
    paths = []
    for channels in (7, 8, 9, 16, 24):
        frames = np.random.default_rng(channels).uniform(-0.9, 0.9, (4_800, channels))
        content, path = tmp_path / "all.wav", tmp_path / f"{channels}.{suffix}"
        content.write_bytes(wav(pcm(frames), channels=channels, rate=48_000))
        codec = ["-c:a", "libopus", "-mapping_family", "255"] if suffix == "mka" else []
        ffmpeg("-i", content, *codec, path)
        paths.append(path)
    for path, (expected, rate) in ffmpeg_decoded(paths).items():
        wave = load_audio(path, sample_rate=rate)
        np.testing.assert_allclose(wave, expected.mean(axis=0), rtol=0, atol=1e-6)


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
    "half a sample of two channels": (wav(HUNDRED + b"\x01", channels=2), 50),
    "half a frame": (wav(HUNDRED + b"\x01\x01", channels=2), 50),
    "8 bit": (wav(bytes(100), bits=8), 100),
    "float": (wav(np.full(100, 0.5, "<f4").tobytes(), form=3, bits=32), 100),
    "one sample": (wav(HUNDRED[:2]), 1),
}


@pytest.mark.parametrize("case", ODD_WAVS)
def test_odd_wavs(case: str) -> None:
    content, samples = ODD_WAVS[case]
    assert load_audio(content, max_seconds=1).size == samples


def test_a_stream_is_the_wave_in_blocks(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is kept or decoded again, and as often as it is read."""
    wave = load_audio(source)
    for kept in (10, 0):
        monkeypatch.setattr(load, "KEPT_SECONDS", kept)
        stream = AudioStream(source.read_bytes())
        assert stream.seconds == 2.0
        for _ in range(2):
            blocks = list(stream)
            assert 2 <= len(blocks) <= 4
            np.testing.assert_array_equal(np.concatenate(blocks), wave)


def test_a_check_stops_decoding(source: Path) -> None:
    class Stopped(Exception):
        pass

    calls = iter(range(20))

    def check() -> None:
        if next(calls) == 10:
            raise Stopped

    for read in (load_audio, AudioStream):
        with pytest.raises(Stopped):
            read(source, check=check)
        calls = iter(range(20))
