"""Files to sound with FFmpeg: common formats here, rare ones in a process of their own.

FFmpeg's readers of rare formats crash on damaged files, and a service must not end with them.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import resource
import select
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import IO

import numpy as np

from kimia_infer.audio import ffmpeg
from kimia_infer.audio.ffmpeg import Block, Rare, Unreadable
from kimia_infer.utils.files import nameless_file

COPIED_BYTES = 1 << 20

CHILD = "import sys; from kimia_infer.audio.decode import main; main(int(sys.argv[1]), sys.argv[2])"
CHILD_MEMORY = 4 << 30
CHILD_CPU_SECONDS = 600
POLL_SECONDS = 0.1

HEADER = struct.Struct("<cIQ")
"""Before each message of the child: its kind, a rate in Hz, and the number of bytes that follow."""

PLAYLIST_BEGINNINGS = (b"#EXTM3U", b"ffconcat version", b"v=0")
PLAYLIST_ROOTS = (b"<MPD", b"<CompositionPlaylist")
"""How files begin that only name other files: HLS, concat, SDP; in XML, MPEG-DASH and IMF."""

MOST_UNREAD = 10
"""Unreadable links of a chain, each of which costs a process, after which the rest is left out."""

MOST_BOXES = 1000
"""More boxes of an MPEG-4 file are not looked at."""

REFLECTED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
"""Each byte with its bits in reverse order."""


def decode(
    file: int, suffix: str, note: Callable[[str], None], check: Callable[[], None]
) -> Iterator[Block]:
    """All sound of a file; arguments and errors are those of :func:`ffmpeg.decode`, but Rare."""
    tag = _tag_bytes(file)
    if tag and os.pread(file, 4, tag) in (b"RIFF", b"FORM", b"OggS"):  # FFmpeg 8 refuses them
        with _copied(file, tag, os.fstat(file).st_size) as untagged:
            yield from decode(untagged, suffix, note, check)
        return
    links = _ogg_links(file, check)
    read, unread = 0, list[Unreadable]()
    for begin, end in links:
        check()
        with _copied(file, begin, end) if len(links) > 1 else contextlib.nullcontext(file) as link:
            try:
                yield from _decode_link(link, suffix, note, check)
                read += 1
            except Unreadable as error:
                unread.append(error)
        if len(unread) == MOST_UNREAD:
            break
    if not read:
        raise Unreadable(_known_reason(file) or str(unread[0])) from unread[0]
    if unread:
        left_out = len(links) - read
        note(f"{left_out} of the {len(links)} files joined in it were left out: {unread[0]}")


def _decode_link(
    file: int, suffix: str, note: Callable[[str], None], check: Callable[[], None]
) -> Iterator[Block]:
    try:
        yield from ffmpeg.decode(file, suffix, note, check)
    except Rare:
        yield from _decode_apart(file, suffix, note, check)


def _decode_apart(
    file: int, suffix: str, note: Callable[[str], None], check: Callable[[], None]
) -> Iterator[Block]:
    """As :func:`ffmpeg.decode` with everything, by a process that ends when the iterator does."""
    with subprocess.Popen(
        [sys.executable, "-S", "-c", CHILD, str(file), suffix],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        pass_fds=[file],
        env={"PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"},
    ) as child:
        assert child.stdout is not None
        try:
            while True:
                kind, rate, size = HEADER.unpack(_read(child.stdout, HEADER.size, check))
                content = _read(child.stdout, size, check)
                if kind == b"E":
                    return
                if kind == b"U":
                    raise Unreadable(content.decode())
                if kind == b"N":
                    note(content.decode())
                else:
                    yield np.frombuffer(content, np.float32), rate
        except EOFError:
            raise Unreadable(f"FFmpeg failed on it (exit status {child.wait()})") from None
        finally:
            child.kill()


def _read(pipe: IO[bytes], size: int, check: Callable[[], None]) -> bytes:
    """``size`` bytes of a pipe. Raises EOFError if it ends before."""
    content = bytearray()
    while len(content) < size:
        check()
        if select.select([pipe], [], [], POLL_SECONDS)[0]:
            piece = os.read(pipe.fileno(), size - len(content))
            if not piece:
                raise EOFError
            content += piece
    return bytes(content)


def main(file: int, suffix: str) -> None:
    """The child: decodes ``file`` and writes messages to its standard output."""
    for limit, value in (
        (resource.RLIMIT_AS, CHILD_MEMORY),
        (resource.RLIMIT_CPU, CHILD_CPU_SECONDS),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))

    def send(kind: bytes, content: bytes = b"", rate: int = 0) -> None:
        sys.stdout.buffer.write(HEADER.pack(kind, rate, len(content)) + content)
        sys.stdout.buffer.flush()

    try:
        for samples, rate in ffmpeg.decode(
            file, suffix, lambda text: send(b"N", text.encode()), lambda: None, everything=True
        ):
            send(b"B", samples.tobytes(), rate)
        send(b"E")
    except Unreadable as error:
        send(b"U", str(error).encode())


def _known_reason(file: int) -> str | None:
    """Why FFmpeg cannot read a file, where it does not say so itself."""
    if _is_playlist(file):
        return "a playlist, which only names other files"
    if _lacks_index(file):
        return "an incomplete MPEG-4 file (its index, at the end, is missing), perhaps cut off"
    return None


def _tag_bytes(file: int) -> int:
    """The length of an ID3 tag at the beginning of a file; 0 without one."""
    tag = os.pread(file, 10, 0)
    if not tag.startswith(b"ID3") or len(tag) < 10:
        return 0
    # Sizes there have 7 bits in a byte.
    return 10 + sum((byte & 0x7F) << 7 * (3 - i) for i, byte in enumerate(tag[6:]))


def _is_playlist(file: int) -> bool:
    """Whether a file begins as one that only names other files, perhaps after an ID3 tag."""
    head = os.pread(file, 4096, _tag_bytes(file)).removeprefix(b"\xef\xbb\xbf").lstrip()
    xml = head.startswith(b"<") and any(root in head for root in PLAYLIST_ROOTS)
    return xml or head.startswith(PLAYLIST_BEGINNINGS)


def _lacks_index(file: int) -> bool:
    """Whether an MPEG-4 file ends before its index ("moov") has come."""
    place = 0
    for _ in range(MOST_BOXES if os.pread(file, 8, 0)[4:] == b"ftyp" else 0):
        head = os.pread(file, 16, place)
        size = int.from_bytes(head[:4], "big")
        if len(head) < 8 or not size:  # 0 is a box that ends with the file
            return True
        if head[4:8] == b"moov":
            return False
        place += max(8, int.from_bytes(head[8:], "big") if size == 1 else size)
    return False


def _ogg_links(file: int, check: Callable[[], None]) -> list[tuple[int, int]]:
    """Where the links of a chained Ogg file begin and end; one for any other file.

    FFmpeg reads a chain as one stream, with the rate and the set-up of its first link. A link
    begins with an intact page that begins a stream (RFC 3533) after one that does not.
    """
    size = os.fstat(file).st_size
    if os.pread(file, 4, 0) != b"OggS":
        return [(0, size)]
    starts, opening, place = [0], True, 0
    with mmap.mmap(file, size, access=mmap.ACCESS_READ) as content:
        while place >= 0 and place + 27 <= size:
            check()
            lacing = content[place + 27 : place + 27 + content[place + 26]]
            end = place + 27 + len(lacing) + sum(lacing)
            begins = bool(content[place + 5] & 2)
            if begins and not opening:
                begins = _is_intact(content[place:end])
                if begins:
                    starts.append(place)
            opening = begins
            place = content.find(b"OggS", end)
    return list(zip(starts, [*starts[1:], size], strict=True))


def _is_intact(page: bytes) -> bool:
    """Whether the checksum of an Ogg page is right: a CRC-32 like zlib's, highest bit first."""
    data = (page[:22] + bytes(4) + page[26:]).translate(REFLECTED)
    checksum = f"{zlib.crc32(data, 0xFFFFFFFF) ^ 0xFFFFFFFF:032b}"[::-1]
    return int(checksum, 2) == int.from_bytes(page[22:26], "little")


@contextlib.contextmanager
def _copied(file: int, begin: int, end: int) -> Iterator[int]:
    """A part of a file as a file of its own."""
    with nameless_file() as copy:
        while begin < end:
            begin += copy.write(os.pread(file, min(end - begin, COPIED_BYTES), begin))
        yield copy.fileno()
