"""Sound files of every kind to waves, against recorded ones; and what is refused, and how."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
import wave as riff
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from torchcodec.decoders import AudioDecoder

from kimia_infer.audio import load
from kimia_infer.audio.load import SAMPLE_RATE, AudioError, load_audio
from tests.conftest import GOLDEN

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
TONE = 440.0


def tone(seconds: float, rate: int) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * TONE * np.arange(round(seconds * rate)) / rate)


def wav(
    data: bytes,
    form: int = 1,
    channels: int = 1,
    rate: int = SAMPLE_RATE,
    bits: int = 16,
    claimed: int | None = None,
) -> bytes:
    """A wav file by hand; ``claimed`` is the data size its header gives."""
    block = channels * bits // 8
    layout = struct.pack("<HHIIHH", form, channels, rate, rate * block, block, bits)
    size = len(data) if claimed is None else claimed
    body = b"WAVEfmt " + struct.pack("<I", 16) + layout + b"data" + struct.pack("<I", size) + data
    return b"RIFF" + struct.pack("<I", min(len(body) - len(data) + size, 2**32 - 1)) + body


def pcm(samples: np.ndarray) -> bytes:
    return np.rint(samples * 32767).astype("<i2").tobytes()


def ffmpeg(*arguments: str | Path) -> None:
    command = ["ffmpeg", "-loglevel", "error", "-nostdin", "-y", *map(str, arguments)]
    subprocess.run(command, check=True, timeout=60)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seconds of a stereo tone at 44.1 kHz."""
    path = tmp_path_factory.mktemp("source") / "tone.wav"
    stereo = np.repeat(tone(2.0, 44_100)[:, None], 2, axis=1)
    path.write_bytes(wav(pcm(stereo), channels=2, rate=44_100))
    return path


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


HUNDRED = pcm(np.full(100, 0.5))
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


NOISE = np.random.default_rng(1).bytes(5_000)
REFUSED = {
    "empty": (b"", "empty file"),
    "text": (b"I am not a sound at all.\n" * 20, "not readable as sound"),
    "noise": (NOISE, "not readable as sound|no audio track"),
    "header only": (wav(HUNDRED)[:40], "not readable as sound"),
    "no samples": (wav(b""), "zero samples"),
    "no samples, 48 kHz": (wav(b"", rate=48_000), "zero samples"),
    "no channels": (wav(HUNDRED, channels=0), "no audio track|not readable as sound"),
    "not a number": (wav(np.array([0, np.nan, 1], "<f4").tobytes(), 3, bits=32), "not finite"),
    "infinite": (wav(np.array([0, np.inf], "<f4").tobytes(), 3, rate=8_000, bits=32), "not finite"),
    "beyond float32": (wav(np.array([0, 1e300], "<f8").tobytes(), 3, bits=64), "not finite"),
    "not normalized": (wav(np.array([0, 3e4], "<f4").tobytes(), 3, bits=32), "full scale is 1"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("limit", [None, 60.0])
def test_refused_content(case: str, limit: float | None, tmp_path: Path) -> None:
    content, reason = REFUSED[case]
    with pytest.raises(AudioError, match=reason):
        load_audio(content, limit)
    path = tmp_path / "upload.wav"
    path.write_bytes(content)
    with pytest.raises(AudioError, match=f"upload.wav: .*({reason})"):
        load_audio(path, limit)


def test_video_without_sound(tmp_path: Path) -> None:
    path = tmp_path / "silent.mp4"
    ffmpeg("-f", "lavfi", "-i", "testsrc=duration=1:size=32x32:rate=5", "-c:v", "mpeg4", path)
    with pytest.raises(AudioError, match="no audio track"):
        load_audio(path)


@pytest.mark.parametrize(
    "name", ["missing.wav", "", ".", "http://localhost/a.wav", "concat:tone.wav", "a\0b", "pipe:0"]
)
def test_only_regular_files(name: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(source.parent)
    with pytest.raises(AudioError, match="not a regular file") as refused:
        load_audio(name)
    assert repr(name) in str(refused.value)


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(AudioError, match="not a regular file"):
        load_audio(tmp_path / "pipe")


def _hls(folder: Path) -> str:
    target = f"#EXTINF:2.0,\n{folder / 'tone.ts'}\n#EXT-X-ENDLIST\n"
    return f"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:2\n{target}"


def _dash(folder: Path) -> str:
    return (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
        'mediaPresentationDuration="PT2S" profiles="urn:mpeg:dash:profile:isoff-on-demand:2011">'
        '<Period><AdaptationSet mimeType="audio/mp4"><Representation id="1" bandwidth="1000">'
        f"<BaseURL>file://{folder / 'tone.m4a'}</BaseURL><SegmentBase/>"
        "</Representation></AdaptationSet></Period></MPD>"
    )


PLAYLISTS: dict[str, Callable[[Path], str]] = {
    "concat": lambda _: "ffconcat version 1.0\nfile tone.wav\n",
    "hls": _hls,
    "dash": _dash,
    "sdp": lambda _: (
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n"
    ),
}
# ffmpeg skips an ID3 tag before it recognizes the format.
ID3 = b"ID3\x03\x00\x00\x00\x00\x00\x0a" + bytes(10)


@pytest.mark.parametrize("prefix", [b"", ID3], ids=["plain", "tagged"])
@pytest.mark.parametrize("kind", PLAYLISTS)
def test_playlists_are_not_followed(
    kind: str, prefix: bytes, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for suffix in ("ts", "m4a"):
        if not (source.parent / f"tone.{suffix}").exists():
            ffmpeg("-i", source, source.parent / f"tone.{suffix}")
    monkeypatch.chdir(source.parent)
    content = prefix + PLAYLISTS[kind](source.parent).encode()
    path = source.parent / "list.wav"
    path.write_bytes(content)
    for given_source in (content, path):
        with pytest.raises(AudioError, match="playlist"):
            load_audio(given_source)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many samples each call of the decoder gave; asking it for everything fails."""
    counts: list[int] = []
    decode = AudioDecoder.get_samples_played_in_range

    def counting(self: AudioDecoder, start: float, stop: float):
        samples = decode(self, start, stop)
        counts.append(samples.data.numel())
        return samples

    monkeypatch.setattr(AudioDecoder, "get_samples_played_in_range", counting)
    monkeypatch.delattr(AudioDecoder, "get_all_samples")
    return counts


@pytest.mark.parametrize("suffix", ["wav", "mp3", "flac", "ogg", "m4a", "webm", "ts"])
def test_longer_sound_is_not_decoded(
    suffix: str, source: Path, tmp_path: Path, decoded: list[int]
) -> None:
    path = tmp_path / f"long.{suffix}"
    ffmpeg("-stream_loop", "19", "-i", source, path)
    with pytest.raises(AudioError, match="longer than the permitted 5 s"):
        load_audio(path, max_seconds=5)
    assert 0 < sum(decoded) <= 2 * 48_000 * 6.1


def test_limit_of_plain_wav() -> None:
    content = wav(pcm(tone(1.0, SAMPLE_RATE)))
    assert load_audio(content, max_seconds=1.0).size == SAMPLE_RATE
    with pytest.raises(AudioError, match=r"longer than the permitted 0\.9 s"):
        load_audio(content, max_seconds=0.9)


def test_limit_at_another_rate() -> None:
    content = wav(pcm(tone(1.0, 48_000)), rate=48_000)
    assert load_audio(content, max_seconds=1.0).size == SAMPLE_RATE
    with pytest.raises(AudioError, match=r"longer than the permitted 0\.999 s"):
        load_audio(content, max_seconds=0.999)


@pytest.mark.parametrize("claimed", [0, 1, 2**36 - 1], ids=["unknown", "one", "weeks"])
def test_limit_counts_samples_not_claims(
    claimed: int, source: Path, tmp_path: Path, decoded: list[int]
) -> None:
    """A FLAC header that lies about its length neither opens the gate nor closes it."""
    path = tmp_path / "tone.flac"
    ffmpeg("-i", source, path)
    content = bytearray(path.read_bytes())
    assert content[:4] == b"fLaC"
    content[21] = content[21] & 0xF0 | claimed >> 32
    content[22:26] = struct.pack(">I", claimed & 0xFFFFFFFF)
    with pytest.raises(AudioError, match=r"longer than the permitted 0\.5 s"):
        load_audio(bytes(content), max_seconds=0.5)
    assert sum(decoded) <= 2 * 44_100 * 1.6
    assert load_audio(bytes(content), max_seconds=3.0).size == 2 * SAMPLE_RATE


@pytest.mark.parametrize("suffix", ["flac", "wav"])
def test_bounded_ranges_join_without_a_seam(
    suffix: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[int]
) -> None:
    path = tmp_path / f"tone.{suffix}"
    ffmpeg("-i", source, path)
    whole = load_audio(path, max_seconds=10)
    decoded.clear()
    monkeypatch.setattr(load, "RANGE_BYTES", 4 * 2 * 10_007)
    np.testing.assert_array_equal(load_audio(path, max_seconds=10), whole)
    assert len(decoded) == 9
    assert max(decoded) <= 2 * 10_008


def test_truncated_files_give_what_is_there(source: Path, tmp_path: Path) -> None:
    for suffix in ("mp3", "wav"):
        path = tmp_path / f"tone.{suffix}"
        ffmpeg("-i", source, "-ac", "1", path)
        content = path.read_bytes()
        wave = load_audio(content[: len(content) // 4 * 2], max_seconds=10)
        assert SAMPLE_RATE / 2 < wave.size < 3 * SAMPLE_RATE / 2


def test_half_a_frame_is_named_as_damage(source: Path) -> None:
    with pytest.raises(AudioError, match="damaged or incomplete"):
        load_audio(source.read_bytes()[:-2], max_seconds=10)


@pytest.fixture(scope="module")
def encoded(source: Path, tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("encoded")
    contents = []
    for suffix in ("wav", "mp3", "flac", "ogg", "m4a"):
        ffmpeg("-t", "0.2", "-i", source, folder / f"tone.{suffix}")
        contents.append((folder / f"tone.{suffix}").read_bytes())
    with riff.open(str(folder / "plain.wav"), "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
        file.writeframes(HUNDRED)
    return [*contents, (folder / "plain.wav").read_bytes()]


@settings(max_examples=settings.default.max_examples * 2)
@given(data=st.data())
def test_damaged_files_load_or_are_refused(data: st.DataObject, encoded: list[bytes]) -> None:
    content = bytearray(data.draw(st.sampled_from(encoded)))
    spots = st.integers(0, min(len(content), 600) - 1) | st.integers(0, len(content) - 1)
    for spot in data.draw(st.lists(spots, max_size=8)):
        content[spot] = data.draw(st.integers(0, 255))
    cut = data.draw(st.none() | st.integers(0, len(content)))
    try:
        wave = load_audio(bytes(content[:cut]), max_seconds=10)
    except AudioError:
        return
    assert wave.dtype == np.float32
    assert 0 < wave.size <= 10 * SAMPLE_RATE
    assert np.isfinite(wave).all()
