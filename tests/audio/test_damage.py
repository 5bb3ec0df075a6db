"""Damaged, cut, joined and changing files: what can be read is used, and the rest is noted."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimia_infer.audio.files import SAMPLE_RATE, AudioError, is_silent, load_audio, loudest_dbfs
from kimia_infer.audio.timeline import Timeline
from tests.audio.sounds import ffmpeg, ffmpeg_decoded, pcm, tone, wav

RATE = 44_100


@pytest.fixture(scope="module")
def encoded(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The two seconds of ``source`` by suffix."""
    folder = tmp_path_factory.mktemp("encoded")
    names = (
        "mp3",
        "aac",
        "flac",
        "ogg",
        "opus",
        "m4a",
        "wav",
        "mka",
        "ts",
        "wma",
        "ac3",
        "mpg",
        "aiff",
    )
    paths = [folder / f"tone.{suffix}" for suffix in names]
    ffmpeg("-i", source, *paths)
    return {path.suffix[1:]: path.read_bytes() for path in paths}


def with_bad_bytes(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + b"\xa5" * 300 + content[middle + 300 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "bad bytes": with_bad_bytes,
    "zeros behind": lambda content: content + bytes(4_000),
    "cut": lambda content: content[: len(content) * 5 // 6],
    "a tag behind": lambda content: content + b"TAG" + b"title".ljust(125, b"\0"),
    "joined": lambda content: content + content,
}
CASES = [
    *((damage, suffix) for damage in DAMAGE for suffix in ("mp3", "aac", "ac3")),
    *((damage, suffix) for damage in ("bad bytes", "cut") for suffix in ("ogg", "flac", "ts")),
    *(("cut", suffix) for suffix in ("wav", "mka", "mpg", "wma")),
]


def test_what_is_damaged_is_left_out_with_a_note(encoded: dict[str, bytes], tmp_path: Path) -> None:
    """As much is left as ffmpeg's own program leaves, but for gaps, which are filled."""
    paths = {}
    for damage, suffix in CASES:
        path = paths[damage, suffix] = tmp_path / f"{damage}.{suffix}"
        path.write_bytes(DAMAGE[damage](encoded[suffix]))
    for (damage, _), path in paths.items():
        notes: list[str] = []
        seconds = load_audio(path, note=notes.append).size / SAMPLE_RATE
        channels, rate = ffmpeg_decoded([path])[path]
        assert seconds == pytest.approx(channels.shape[1] / rate, abs=0.12), path.name
        assert seconds >= 0.9, path.name
        if damage == "bad bytes":
            assert notes, path.name


def test_a_cut_file_is_shorter_than_its_header_says(encoded: dict[str, bytes]) -> None:
    for suffix in ("wav", "flac", "mka"):
        notes: list[str] = []
        content = encoded[suffix]
        load_audio(content[: len(content) // 2], note=notes.append)
        assert any("s that its header gives" in note for note in notes), suffix


def test_an_upload_that_broke_off_before_the_index_is_called_incomplete(
    encoded: dict[str, bytes],
) -> None:
    content = encoded["m4a"]
    assert content.index(b"mdat") < content.index(b"moov")
    for end in (content.index(b"mdat") + 4, len(content) // 2, content.index(b"moov") - 4):
        with pytest.raises(AudioError, match=r"incomplete MPEG-4 file .* at the end, is missing"):
            load_audio(content[:end])


@pytest.mark.parametrize("rate", [SAMPLE_RATE, RATE])
def test_a_second_sound_in_a_wav_file_is_noted(rate: int) -> None:
    """ffmpeg reads the first of joined files, and the last of several chunks."""
    first = wav(pcm(tone(0.5, rate)), rate=rate)
    extra = b"LIST" + struct.pack("<I", 5) + b"INFOx\0"
    chunk = b"data" + struct.pack("<I", 200) + bytes(200)
    for behind, lost in ((first, True), (extra + chunk, True), (extra, False), (b"\0", False)):
        notes: list[str] = []
        wave = load_audio(first + behind, note=notes.append)
        assert wave.size == SAMPLE_RATE // 2 or chunk in behind
        assert notes == ["it holds several sounds one after another, of which one was read"] * lost


def test_notes_are_logged_by_default(
    encoded: dict[str, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "bad.mp3"
    path.write_bytes(with_bad_bytes(encoded["mp3"]))
    load_audio(path)
    assert f"{path}: 1 of" in caplog.text
    assert "damaged" in caplog.text


def test_a_streamed_wav_may_end_within_a_sample(tmp_path: Path) -> None:
    frames = pcm(tone(1.0, RATE))
    for rate in (SAMPLE_RATE, RATE):
        content = wav(frames + b"\x01", rate=rate, claimed=2**32 - 1)
        assert load_audio(content, sample_rate=rate).size == RATE


@pytest.mark.parametrize("codec", ["libvorbis", "libopus", "flac", "libspeex"])
def test_each_link_of_an_ogg_chain_has_its_own_rate(
    codec: str, source: Path, tmp_path: Path
) -> None:
    links = []
    for rate in (16_000, 8_000):
        path = tmp_path / f"{rate}.ogg"
        ffmpeg("-i", source, "-c:a", codec, "-ar", str(rate), "-ac", "1", path)
        links.append(path.read_bytes())
    expected = np.concatenate([load_audio(link) for link in links])
    chained = load_audio(b"".join(links))
    assert expected.size == pytest.approx(4 * SAMPLE_RATE, abs=0.1 * SAMPLE_RATE)
    # Opus has one rate, so there the seam is resampled without a break.
    np.testing.assert_allclose(chained, expected, atol=0.01 if codec == "libopus" else 0)


def test_a_damaged_link_of_an_ogg_chain_does_not_lose_the_others(encoded: dict[str, bytes]) -> None:
    for suffix in ("ogg", "opus"):
        link = encoded[suffix]
        alone = load_audio(link)
        unreadable = {
            "cut in its first page": (link[:50], None),
            "only headers": (link[: link.index(b"OggS", 4) + 60], "1 of the 2 files joined in it"),
            "no page": (b"OggS\0\2" + bytes(60), None),
        }
        for case, (rest, noted) in unreadable.items():
            notes: list[str] = []
            np.testing.assert_array_equal(load_audio(link + rest, note=notes.append), alone)
            assert notes[:1] == notes, case
            assert (noted or "") in "".join(notes), case
        # A damaged page that seems to begin a stream is one bad page.
        place = link.index(b"OggS", len(link) // 2)
        damaged = bytearray(link)
        damaged[place + 5] |= 2
        assert load_audio(bytes(damaged)).size > 0.4 * alone.size


@pytest.mark.parametrize("suffix", ["wav", "aiff", "ogg", "flac", "aac", "mp3"])
def test_a_tag_in_front_changes_nothing(suffix: str, encoded: dict[str, bytes]) -> None:
    notes: list[str] = []
    for tag in (b"ID3\3\0\0\0\0\0\x0a" + bytes(10), b"ID3\4\0\0\0\0\1\0" + bytes(128)):
        found = load_audio(tag + encoded[suffix], note=notes.append)
        np.testing.assert_array_equal(found, load_audio(encoded[suffix]))
    assert notes == []


def test_an_estimated_length_is_no_claim(tmp_path: Path) -> None:
    """FFmpeg guesses from the bit rate of the beginning, which here is silent."""
    rng = np.random.default_rng(0)
    sound = np.concatenate([np.zeros(2 * RATE), rng.uniform(-0.8, 0.8, 4 * RATE)])
    source = tmp_path / "source.wav"
    source.write_bytes(wav(pcm(sound), rate=RATE))
    for name, options in {
        "long.mp3": ["-q:a", "2", "-write_xing", "0"],
        "long.aac": ["-q:a", "2"],
        "ima.avi": ["-c:a", "adpcm_ima_wav"],
    }.items():
        path, notes = tmp_path / name, list[str]()
        ffmpeg("-i", source, *options, path)
        assert load_audio(path, note=notes.append).size > 5.9 * SAMPLE_RATE
        assert notes == [], name


def test_the_track_that_ffmpeg_would_take(source: Path, tmp_path: Path) -> None:
    """The default one, else the one with most channels, whatever their bit rates are."""
    paths = []
    for suffix, codec in (("ts", "ac3"), ("mpg", "mp2"), ("avi", "mp3"), ("mka", "aac")):
        path = tmp_path / f"two.{suffix}"
        tracks = ["-map", "0", "-map", "1", "-ac:a:0", "1", "-b:a:0", "160k", "-b:a:1", "96k"]
        half = ["-t", "1", "-i", source]
        ffmpeg("-i", source, *half, *tracks, "-c:a", codec, path)
        paths.append(path)
    for path in paths:
        expected = tmp_path / "expected.wav"
        ffmpeg("-i", path, expected)
        notes: list[str] = []
        wave = load_audio(path, note=notes.append)
        np.testing.assert_allclose(wave, load_audio(expected), atol=1e-3)
        assert notes == ["one of its 2 audio tracks was used"]


@pytest.mark.parametrize("suffix", ["mp3", "aac", "ac3"])
@pytest.mark.parametrize("forms", [((1, RATE), (2, RATE)), ((2, RATE), (1, 32_000))], ids=str)
def test_rate_and_channels_may_change_within_a_stream(
    suffix: str, forms: list[tuple[int, int]], source: Path, tmp_path: Path
) -> None:
    content = b""
    for number, (channels, rate) in enumerate(forms):
        path = tmp_path / f"{number}.{suffix}"
        options = ["-write_xing", "0"] if suffix == "mp3" else []
        ffmpeg("-i", source, "-ac", str(channels), "-ar", str(rate), *options, path)
        content += path.read_bytes()
    wave = load_audio(content)
    assert wave.size == pytest.approx(4 * SAMPLE_RATE, abs=0.15 * SAMPLE_RATE)
    for begin in (0.5, 2.7):  # the tone, at its own pitch, in both parts
        part = wave[round(begin * SAMPLE_RATE) :][:SAMPLE_RATE]
        spectrum = np.abs(np.fft.rfft(part * np.hanning(part.size)))
        assert spectrum.argmax() == 440


def timed(path: Path, starts: list[float], form: str | None = None) -> Path:
    """Half a second of tone at each of ``starts`` seconds, and nothing between them."""
    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream("mp2", rate=48_000, layout="mono")
        for start in starts:
            samples = np.rint(tone(0.5, 48_000) * 32767).astype(np.int16)
            for begin in range(0, samples.size - 1151, 1152):
                piece = samples[None, begin : begin + 1152]
                frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(piece), "s16", "mono")
                frame.sample_rate, frame.pts = 48_000, round(start * 48_000) + begin
                container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def sounding(wave: np.ndarray) -> list[float]:
    """Seconds at which sound begins after silence."""
    blocks = np.abs(wave[: wave.size // 160 * 160]).reshape(-1, 160).max(axis=1) > 0.05
    return [
        i / 100 for i in range(len(blocks)) if blocks[i] and not blocks[max(0, i - 5) : i].any()
    ]


@pytest.mark.parametrize("suffix", ["mka", "mp4", "nut"])
@pytest.mark.parametrize("second", [1.5, 10.0, 60.0])
def test_gaps_of_a_container_are_silence(suffix: str, second: float, tmp_path: Path) -> None:
    notes: list[str] = []
    path = timed(tmp_path / f"gap.{suffix}", [0.0, second])
    begins = sounding(load_audio(path, note=notes.append))
    assert begins == pytest.approx([0.0, second], abs=0.06)
    [seconds] = re.findall(r"silence fills 1 gap between its times, ([\d.]+) s", notes[0])
    assert float(seconds) == pytest.approx(second - 0.5, abs=0.05)
    with pytest.raises(AudioError, match="longer than the permitted"):
        load_audio(path, max_seconds=second)


def test_a_late_start_beside_a_picture_is_silence(source: Path, tmp_path: Path) -> None:
    picture = ["-f", "lavfi", "-i", "testsrc=duration=1:size=32x32:rate=5", "-c:v", "mpeg4"]
    path = tmp_path / "late.mkv"
    ffmpeg(
        *picture[:4], "-itsoffset", "3", "-i", source, "-map", "0", "-map", "1", *picture[4:], path
    )
    assert sounding(load_audio(path)) == pytest.approx([3.0], abs=0.06)


def test_a_late_start_of_sound_alone_is_its_beginning(tmp_path: Path) -> None:
    """As ffmpeg's program has it: a piece of a live stream bears the time of the whole."""
    notes: list[str] = []
    wave = load_audio(timed(tmp_path / "late.mka", [3.0]), note=notes.append)
    assert sounding(wave) == [0.0]
    assert notes == []


@dataclass
class Frame:
    time: float
    samples: int = 960
    sample_rate: int = 48_000


@given(
    seed=st.integers(0, 999),
    stall=st.integers(0, 80),
    gap=st.floats(1.5, 60),
    place=st.none() | st.integers(20, 100),
)
def test_frames_that_arrive_late_leave_no_gap(
    seed: int, stall: int, gap: float, place: int | None
) -> None:
    """Times of a live recording are those of arrival: late, then in time again. Real gaps stay."""
    late = np.random.default_rng(seed).uniform(0, 0.08, 150)
    late[stall : stall + 20] = 0.4 - 0.02 * np.arange(20)  # and then all at once
    sent = [0.02 * i + gap * (place is not None and i >= place) for i in range(150)]
    times = np.maximum.accumulate(np.add(sent, late))
    container: Any = SimpleNamespace(
        start_time=0, format=SimpleNamespace(name="matroska,webm", flags=0)
    )
    timeline = Timeline(container)
    frames: Any = (Frame(float(time)) for time in times)
    gaps = [found for found, _ in timeline.gaps(frames) if found]
    assert bool(gaps) == (place is not None)
    assert sum(gaps) == pytest.approx(0.0 if place is None else gap, abs=0.2)
    assert timeline.seconds == pytest.approx(3 + sum(gaps))


def test_a_clock_that_jumps_leaves_no_gap(tmp_path: Path) -> None:
    notes: list[str] = []
    path = timed(tmp_path / "jump.ts", [0.0, 100.0], "mpegts")
    wave = load_audio(path, note=notes.append)
    assert wave.size < 1.1 * SAMPLE_RATE
    assert "jump forward by 99.5 s" in notes[0]


@given(
    delay=st.integers(0, 3), channels=st.integers(2, 8), loud=st.floats(0.1, 0.9), dc=st.booleans()
)
@settings(max_examples=20)
def test_channels_that_cancel_each_other_are_not_silence(
    delay: int, channels: int, loud: float, dc: bool
) -> None:
    """A voice on two channels of opposite sign, whatever else there is, is heard and noted."""
    voice = loud * tone(1.0, SAMPLE_RATE) * np.random.default_rng(delay).uniform(0, 1, SAMPLE_RATE)
    frames = np.zeros((SAMPLE_RATE, channels))
    frames[:, 0], frames[:, 1] = voice, -voice
    frames += 0.01 * dc
    notes: list[str] = []
    wave = load_audio(wav(pcm(frames), channels=channels), note=notes.append)
    found = wave - wave.mean()
    assert abs(np.corrcoef(found, voice)[0, 1]) > 0.999
    assert notes == [
        "its channels cancel each other in 1.0 of 1.0 s; the loudest one was used there"
    ]


@given(weaker=st.floats(0.7, 1), channels=st.integers(2, 4))
@settings(max_examples=10)
def test_channels_that_nearly_cancel_each_other(weaker: float, channels: int) -> None:
    voice = tone(1.0, SAMPLE_RATE)
    frames = np.zeros((SAMPLE_RATE, channels))
    frames[:, 0], frames[:, 1] = voice, -weaker * voice
    notes: list[str] = []
    wave = load_audio(wav(pcm(frames), channels=channels), note=notes.append)
    np.testing.assert_allclose(wave, voice, atol=1e-4)
    assert "cancel each other" in notes[0]


@given(values=st.lists(st.floats(-0.9, 0.9), min_size=2, max_size=4), rate=st.sampled_from([8, 16]))
@settings(max_examples=20)
def test_constant_channels_do_not_cancel_each_other(values: list[float], rate: int) -> None:
    content = wav(pcm(np.tile(values, (20_000, 1))), channels=len(values), rate=1000 * rate)
    notes: list[str] = []
    wave = load_audio(content, note=notes.append)
    assert wave[2_000:-2_000] == pytest.approx(np.mean(values), abs=1e-4)
    assert is_silent(loudest_dbfs(wave, SAMPLE_RATE))
    assert notes == []


@given(channels=st.integers(1, 40), seed=st.integers(0, 99), speaking=st.integers(0, 39))
@settings(max_examples=20)
def test_other_channels_are_averaged(channels: int, seed: int, speaking: int) -> None:
    """Independent ones, one that speaks among silent ones, and none."""
    rng = np.random.default_rng(seed)
    frames = rng.uniform(-0.9, 0.9, (4_000, channels))
    if seed % 2:
        frames[:, np.arange(channels) != speaking % channels] = 0
    notes: list[str] = []
    wave = load_audio(wav(pcm(frames), channels=channels), note=notes.append)
    np.testing.assert_allclose(wave, np.rint(frames * 32767).mean(axis=1) / 32768, atol=1e-6)
    assert notes == []


def test_a_constant_value_is_silent_at_any_rate() -> None:
    for rate in (RATE, 8_000, SAMPLE_RATE):
        content = wav(pcm(np.full((rate, 2), 0.5)), channels=2, rate=rate)
        assert is_silent(loudest_dbfs(load_audio(content), SAMPLE_RATE))
