"""Sounds made by hand and by ffmpeg."""

from __future__ import annotations

import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from kimia_infer.audio.files import SAMPLE_RATE

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


HUNDRED = pcm(np.full(100, 0.5))
"""A hundred samples, 16 bit."""


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
"""Playlists, by format, of the files ``tone.wav``, ``tone.ts`` or ``tone.m4a`` of a folder.

ffmpeg follows ``dash`` from anywhere, and ``concat`` from within the folder.
"""


def ffmpeg_decoded(paths: Iterable[Path]) -> dict[Path, tuple[np.ndarray, int]]:
    """What ffmpeg's own program decodes: float32 [channels, samples] at the file's own rate.

    Damage is reported by it and skipped. All files are decoded by one process.
    """
    paths = list(paths)
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / f"{number}.wav" for number in range(len(paths))]
        arguments: list[str | Path] = ["-loglevel", "quiet"]
        for path in paths:
            arguments += ["-i", path]
        for number, output in enumerate(outputs):
            arguments += ["-map", f"{number}:a:0", "-c:a", "pcm_f32le", "-bitexact", output]
        ffmpeg(*arguments)
        return {path: _float_wav(made) for path, made in zip(paths, outputs, strict=True)}


def _float_wav(path: Path) -> tuple[np.ndarray, int]:
    content = path.read_bytes()
    channels, rate = struct.unpack_from("<HI", content, content.index(b"fmt ") + 10)
    begin = content.index(b"data") + 8
    samples = np.frombuffer(content, "<f4", offset=begin)
    return samples.reshape(-1, channels).T, rate
