"""Samples to sound in one of six formats, piece by piece as they are made."""

from __future__ import annotations

import struct
from typing import Literal, Protocol

import numpy as np

from kimia_infer.audio.files import pcm16, wav_bytes

SpeechFormat = Literal["mp3", "opus", "aac", "flac", "wav", "pcm"]

MEDIA_TYPES: dict[SpeechFormat, str] = {
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
    "aac": "audio/aac",
    "flac": "audio/flac",
    "wav": "audio/wav",
    "pcm": "audio/pcm",
}
"""Of each format. Opus is in Ogg, AAC in ADTS, pcm is 16 bits, little endian, without a header."""

ENCODINGS = {
    "mp3": ("mp3", "libmp3lame", 96_000, {"write_xing": "0", "id3v2_version": "0"}),
    "opus": ("ogg", "libopus", 48_000, {"page_duration": "100000"}),  # in microseconds
    "aac": ("adts", "aac", 96_000, {}),
    "flac": ("flac", "flac", None, {}),
}
"""Container and codec as FFmpeg calls them, bits per second, and the container's options."""

UNKNOWN_SIZE = 2**32 - 1
"""In the header of a wav whose length is not known: programs then read to the end."""


class SpeechEncoder:
    """Encodes one sound, mono at ``sample_rate`` Hz, while it is made.

    What :meth:`push` and :meth:`finish` return, joined, is the file; a piece may be empty, as
    codecs look ahead. Players take it while it arrives: no header says how long it will be.
    """

    def __init__(self, form: SpeechFormat, sample_rate: int):
        self._encoder: _Encoder
        if form in ("wav", "pcm"):
            self._encoder = _Samples(_wav_header(sample_rate) if form == "wav" else b"")
        else:
            self._encoder = _Coded(form, sample_rate)

    def push(self, wave: np.ndarray) -> bytes:
        """What is known of the file once ``wave``, float32 [samples], follows; [-1, 1] is full."""
        return self._encoder.push(wave)

    def finish(self) -> bytes:
        """The rest of the file; nothing may be pushed afterwards."""
        return self._encoder.finish()


def encode(wave: np.ndarray, form: SpeechFormat, sample_rate: int) -> bytes:
    """A whole sound, float32 [samples], as a file; a wav's header has its length."""
    if form == "wav":
        return wav_bytes(wave, sample_rate)
    encoder = SpeechEncoder(form, sample_rate)
    return encoder.push(wave) + encoder.finish()


class _Encoder(Protocol):
    def push(self, wave: np.ndarray) -> bytes: ...

    def finish(self) -> bytes: ...


class _Samples:
    """16-bit samples after a header."""

    def __init__(self, header: bytes):
        self._header = header

    def push(self, wave: np.ndarray) -> bytes:
        content, self._header = self._header + pcm16(wave).tobytes(), b""
        return content

    def finish(self) -> bytes:
        content, self._header = self._header, b""
        return content


def _wav_header(sample_rate: int) -> bytes:
    form = struct.pack("<HHIIHH", 1, 1, sample_rate, 2 * sample_rate, 2, 16)
    size = struct.pack("<I", UNKNOWN_SIZE)
    return b"RIFF" + size + b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + size


class _Coded:
    """What FFmpeg encodes."""

    def __init__(self, form: SpeechFormat, sample_rate: int):
        import av  # the package is needed for these formats alone

        container, codec, bit_rate, options = ENCODINGS[form]
        self._written, self._samples, self._rate = _Written(), 0, sample_rate
        self._container = av.open(
            self._written, "w", container, container_options={"flush_packets": "1", **options}
        )
        stream = self._container.add_stream(codec, sample_rate, layout="mono")
        assert isinstance(stream, av.AudioStream)
        self._stream = stream
        if bit_rate is not None:
            self._stream.bit_rate = bit_rate

    def push(self, wave: np.ndarray) -> bytes:
        import av

        if len(wave):
            frame = av.AudioFrame.from_ndarray(pcm16(wave)[None], "s16", "mono")
            frame.sample_rate, frame.pts = self._rate, self._samples
            self._samples += len(wave)
            self._container.mux(self._stream.encode(frame))
        return self._written.take()

    def finish(self) -> bytes:
        self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._written.take()


class _Written:
    """A file to write to, without a place to go back to, whose content is taken away."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def write(self, piece: bytes) -> int:
        self._pieces.append(piece)
        return len(piece)

    def take(self) -> bytes:
        content = b"".join(self._pieces)
        self._pieces.clear()
        return content
