"""Files that are no sound, longer than permitted, or point elsewhere: refused, and how."""

from __future__ import annotations

import os
import struct
import subprocess
import wave as riff
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimia_infer.audio import decode
from kimia_infer.audio.files import SAMPLE_RATE, AudioError, load_audio
from tests.audio.sounds import HUNDRED, PLAYLISTS, ffmpeg, pcm, tone, wav

NOISE = np.random.default_rng(1).bytes(5_000)
REFUSED = {
    "empty": (b"", "empty file"),
    "text": (b"I am not a sound at all.\n" * 20, "not readable as sound"),
    "noise": (NOISE, "not readable as sound|no audio track"),
    "header only": (wav(HUNDRED)[:40], "not readable as sound"),
    "no samples": (wav(b""), "zero samples"),
    "no samples, 48 kHz": (wav(b"", rate=48_000), "zero samples"),
    "no channels": (wav(HUNDRED, channels=0), "no audio track|not readable as sound"),
    "no rate": (wav(HUNDRED, rate=0), "not readable as sound|no sample rate"),
    "3 Hz": (wav(HUNDRED, rate=3), "3 Hz is no sample rate"),
    "2 GHz": (wav(HUNDRED, rate=2_000_000_000), "2000000000 Hz is no sample rate"),
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
    with pytest.raises(AudioError, match=r"no such file|is a directory") as refused:
        load_audio(name)
    assert repr(name) in str(refused.value)


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(AudioError, match="is a pipe"):
        load_audio(tmp_path / "pipe")


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


WORDS = ["#EXTM3U", "ffconcat version 1.0", "v=0 c=IN IP4 127.0.0.1", "<MPD>", "dash:profile"]


@pytest.mark.parametrize("words", WORDS)
def test_tags_may_speak_of_playlists(words: str, source: Path, tmp_path: Path) -> None:
    for suffix in ("mp3", "wav", "flac", "m4a"):
        path = tmp_path / f"tagged.{suffix}"
        ffmpeg("-t", "0.5", "-i", source, "-metadata", f"comment={words}", path)
        assert words.encode() in path.read_bytes()
        assert load_audio(path).size == pytest.approx(SAMPLE_RATE / 2, abs=SAMPLE_RATE / 20)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many samples each block of FFmpeg's had."""
    counts: list[int] = []
    everything = decode.decode

    def counting(*arguments: Any) -> Iterator[tuple[np.ndarray, int]]:
        for samples, rate in everything(*arguments):
            counts.append(samples.size)
            yield samples, rate

    monkeypatch.setattr(decode, "decode", counting)
    return counts


@pytest.mark.parametrize("suffix", ["wav", "mp3", "flac", "ogg", "m4a", "webm", "ts"])
def test_longer_sound_is_not_decoded(
    suffix: str, source: Path, tmp_path: Path, decoded: list[int]
) -> None:
    path = tmp_path / f"long.{suffix}"
    ffmpeg("-stream_loop", "19", "-i", source, path)
    with pytest.raises(AudioError, match="longer than the permitted 5 s"):
        load_audio(path, max_seconds=5)
    assert 0 < sum(decoded) <= 48_000 * 6.1


def test_a_chain_of_nothing_readable_is_not_read_to_its_end(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every link that FFmpeg does not know costs a process."""
    monkeypatch.setattr(decode, "MOST_UNREAD", 2)
    ffmpeg("-i", source, tmp_path / "tone.ogg")
    link = (tmp_path / "tone.ogg").read_bytes()
    header = link[: link.index(b"OggS", 4)] + b"OggS\0\0" + bytes(21)
    notes: list[str] = []
    wave = load_audio(link + 4 * header + link, note=notes.append)
    np.testing.assert_array_equal(wave, load_audio(link))
    assert notes[0].startswith("5 of the 6 files joined in it were left out")
    with pytest.raises(AudioError, match="not readable"):
        load_audio(4 * header + link)


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
    assert sum(decoded) <= 44_100 * 1.6
    assert load_audio(bytes(content), max_seconds=3.0).size == 2 * SAMPLE_RATE


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


@pytest.fixture(scope="module")
def rare(source: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("rare") / "tone.adx"
    ffmpeg("-stream_loop", "9", "-i", source, path)
    return path.read_bytes()


def test_a_file_that_crashes_ffmpeg_is_refused(rare: bytes) -> None:
    """FFmpeg 8.1 divides by the block size of ADX, which the file gives."""
    assert load_audio(rare).size == pytest.approx(20 * SAMPLE_RATE, abs=32)
    with pytest.raises(AudioError, match=r"FFmpeg failed on it \(exit status -8\)"):
        load_audio(rare[:5] + b"\0" + rare[6:])


def test_a_rare_file_is_decoded_no_further_than_permitted(rare: bytes) -> None:
    with pytest.raises(AudioError, match="longer than the permitted 5 s"):
        load_audio(rare, max_seconds=5)
    assert not children()


def test_a_check_stops_a_process_that_decodes(rare: bytes) -> None:
    class Stopped(Exception):
        pass

    def check() -> None:
        if children():
            raise Stopped

    with pytest.raises(Stopped):
        load_audio(rare, check=check)
    assert not children()


def children() -> list[str]:
    """Processes of this one that decode."""
    command = ["pgrep", "-f", "-P", str(os.getpid()), "kimia_infer.audio.decode"]
    return subprocess.run(command, capture_output=True, text=True).stdout.split()
