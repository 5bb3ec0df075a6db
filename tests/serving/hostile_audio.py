"""Sound files that lie, break off or are something else, drawn by hypothesis.

What is drawn is a recipe; the files that recipes begin with are made once, by ``originals``.
"""

from __future__ import annotations

import gzip
import io
import struct
import subprocess
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

from hypothesis import strategies as st

FORMATS = {
    "pcm.wav": "-c:a pcm_s16le -ar 16000 -ac 1 -f wav",
    "pcm24.wav": "-c:a pcm_s24le -ar 44100 -ac 2 -f wav",
    "float.wav": "-c:a pcm_f32le -ar 48000 -f wav",
    "adpcm.wav": "-c:a adpcm_ms -f wav",
    "wave64.w64": "-c:a pcm_s16le -f w64",
    "flac.flac": "-c:a flac -f flac",
    "flac.ogg": "-c:a flac -f ogg",
    "mp3.mp3": "-c:a libmp3lame -f mp3",
    "vorbis.ogg": "-c:a libvorbis -f ogg",
    "opus.ogg": "-c:a libopus -f ogg",
    "opus.webm": "-c:a libopus -f webm",
    "aac.m4a": "-c:a aac -f ipod",
    "alac.m4a": "-c:a alac -f ipod",
    "fragments.mp4": "-c:a aac -movflags frag_keyframe+empty_moov -f mp4",
    "aac.aac": "-c:a aac -f adts",
    "pcm.aiff": "-c:a pcm_s16be -f aiff",
    "pcm.caf": "-c:a pcm_s16be -f caf",
    "mp2.ts": "-c:a mp2 -f mpegts",
    "wma.asf": "-c:a wmav2 -f asf",
    "aac.flv": "-c:a aac -f flv",
    "adpcm.adx": "-c:a adpcm_adx -f adx",
    "pcm.ast": "-c:a pcm_s16be_planar -f ast",
}
"""Options of ffmpeg for each file."""

BOMB = "hour.flac"
"""An hour of silence in a small file."""

ODD = (0, 1, 2, 3, 7, 8, 24, 255, 256, 32_768, 65_535, 2**24)
ODD += (2**31 - 1, 2**31, 2**32 - 8, 2**32 - 1)
BOXES = (b"moov", b"mdhd", b"mvhd", b"stsz", b"stts", b"stsc", b"stco", b"stsd", b"mp4a", b"esds")
BOXES += (b"alac", b"trun", b"tfhd", b"mdat", b"ftyp")
CHUNKS = (b"RIFF", b"fmt ", b"data", b"LIST", b"fLaC", b"COMM", b"SSND", b"desc", b"pakt")
PAGE_MARKS = (b"\x01vorbis", b"OpusHead", b"OpusTags", b"\x7fFLAC")

Recipe = tuple[str, list[Callable[[bytes], bytes]]]


def originals(directory: Path, source: Path) -> dict[str, bytes]:
    """A third of a second of ``source`` in all formats, and the bomb."""

    def made(name: str, inputs: list[str], options: str) -> bytes:
        command = ["ffmpeg", "-nostdin", "-v", "error", *inputs, *options.split()]
        subprocess.run([*command, str(directory / name)], check=True)
        return (directory / name).read_bytes()

    sound = ["-t", "0.3", "-i", str(source)]
    files = {name: made(name, sound, options) for name, options in FORMATS.items()}
    hour = ["-f", "lavfi", "-t", "3600", "-i", "anullsrc=r=8000:cl=mono"]
    return files | {BOMB: made(BOMB, hour, "-c:a flac -f flac")}


def cook(recipe: Recipe, files: Mapping[str, bytes]) -> bytes:
    """The file of a recipe, which begins with one of ``files`` or with nothing."""
    name, changes = recipe
    content = files.get(name, b"")
    for change in changes:
        content = change(content)
    return content


def packed(width: int, value: int, big: bool) -> bytes:
    return (value % 2 ** (8 * width)).to_bytes(width, "big" if big else "little")


def ogg_sealed(content: bytes) -> bytes:
    """``content`` with the checksum of every ogg page made right, so that its lies are read."""
    pages = bytearray(content)
    start = pages.find(b"OggS")
    while 0 <= start <= len(pages) - 27:
        end = pages.find(b"OggS", start + 4)
        stop = len(pages) if end < 0 else end
        pages[start + 22 : start + 26] = bytes(4)
        pages[start + 22 : start + 26] = struct.pack("<I", _ogg_checksum(pages[start:stop]))
        start = end
    return bytes(pages)


def _ogg_checksum(page: bytes) -> int:
    """CRC of RFC 3533: polynomial 0x04C11DB7, not reflected, starting at 0."""
    value = 0
    for byte in page:
        value ^= byte << 24
        for _ in range(8):
            value = (value << 1) ^ (0x104C11DB7 if value & 0x80000000 else 0)
    return value


def zipped(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("sound.wav", content)
    return file.getvalue()


def with_id3(size: int) -> Callable[[bytes], bytes]:
    """Behind an ID3 tag that says it has ``size`` bytes."""
    digits = bytes((size >> shift) & 0x7F for shift in (21, 14, 7, 0))
    return lambda content: b"ID3\x04\x00\x00" + digits + content


Change = Callable[[bytes], bytes]


def _truncate(where: float) -> Change:
    return lambda content: content[: int(where * len(content))]


def _replace(where: float, removed: int, what: bytes) -> Change:
    """``what`` in place of ``removed`` bytes."""

    def change(content: bytes) -> bytes:
        start = int(where * len(content))
        return content[:start] + what + content[start + removed :]

    return change


def _overwrite(start: int, what: bytes) -> Change:
    """``what`` in place of as many bytes; a start below 0 counts from the end."""

    def change(content: bytes) -> bytes:
        at = min(max(start + (len(content) if start < 0 else 0), 0), len(content))
        return content[:at] + what + content[at + len(what) :]

    return change


def _after(mark: bytes, offset: int, what: bytes) -> Callable[[bytes], bytes]:
    """``what`` at a distance from where ``mark`` stands first, if it does; ogg pages resealed."""

    def change(content: bytes) -> bytes:
        at = content.find(mark)
        if at < 0 or at + offset < 0:
            return content
        changed = _overwrite(at + offset, what)(content)
        return ogg_sealed(changed) if content.startswith(b"OggS") else changed

    return change


def _flip(places: list[tuple[float, int]]) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        flipped = bytearray(content)
        for where, mask in places:
            if flipped:
                flipped[int(where * len(content))] ^= mask
        return bytes(flipped)

    return change


odd = st.sampled_from(ODD)
place = st.floats(0, 1, exclude_max=True)
numbers = st.builds(packed, st.sampled_from([1, 2, 4, 8]), odd, st.booleans())

changes = st.one_of(
    st.builds(_truncate, place),
    st.builds(lambda count: lambda content: content[:count], st.integers(0, 200)),
    st.builds(_flip, st.lists(st.tuples(place, st.integers(1, 255)), min_size=1, max_size=20)),
    st.builds(_overwrite, st.integers(-64, 400), numbers),
    st.builds(_overwrite, st.integers(0, 400), st.binary(min_size=1, max_size=40)),
    st.builds(_after, st.sampled_from(BOXES), st.integers(-4, 40), numbers),
    st.builds(_after, st.sampled_from(CHUNKS), st.integers(4, 30), numbers),
    st.builds(_after, st.sampled_from(PAGE_MARKS), st.integers(7, 30), numbers),
    st.builds(_after, st.just(b"OggS"), st.integers(4, 27), numbers),
    st.builds(_replace, place, st.integers(1, 5000), st.just(b"")),
    st.builds(_replace, place, st.just(0), st.binary(min_size=1, max_size=64)),
    st.builds(lambda times: lambda content: content * times, st.integers(2, 5)),
    st.builds(with_id3, odd),
    st.sampled_from([zipped, gzip.compress, ogg_sealed]),
)

damaged: st.SearchStrategy[Recipe] = st.tuples(
    st.sampled_from(list(FORMATS)), st.lists(changes, min_size=1, max_size=3)
)


noise: st.SearchStrategy[Recipe] = st.binary(max_size=300).map(
    lambda content: ("noise", [lambda _: content])
)
bombs = st.just((BOMB, []))

recipes: st.SearchStrategy[Recipe] = st.sampled_from([*[damaged] * 18, noise, bombs]).flatmap(
    lambda kind: kind
)
