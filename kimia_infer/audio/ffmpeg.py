"""What FFmpeg decodes from an open file: mono samples at the file's own rate, block by block.

Every packet is decoded, in order, as ffmpeg's own program does. What is damaged is left out and
noted. The file is not trusted: FFmpeg gets an open file and nothing else to open, and does not know
the formats that consist of references to other files.
"""

from __future__ import annotations

import contextlib
import functools
import os
import wave as riff
from collections.abc import Callable, Iterator

import av
import numpy as np
from av.audio.plane import AudioPlane
from av.container import InputContainer
from av.stream import Disposition

from kimia_infer.audio import RATES
from kimia_infer.audio.timeline import Timeline

FORMATS_OF_REFERENCES = {
    *("concat", "dash", "ffmetadata", "hls", "imf", "lavfi", "rtp", "rtsp", "sap", "sdp"),
    *("image2", "image2pipe", "mlv", "tedcaptions", "vobsub", "webm_dash_manifest"),
}
"""Formats of FFmpeg that open further files or sockets, or that hold no sound."""

COMMON_FORMATS = {
    *("aac", "ac3", "aiff", "amr", "asf", "au", "avi", "caf", "eac3", "flac", "flv", "mp3"),
    *("matroska", "webm", "matroska,webm", "mov", "mp4", "m4a", "mov,mp4,m4a,3gp,3g2,mj2"),
    *("mpeg", "mpegts", "ogg", "w64", "wav"),
}
COMMON_CODECS = {
    *(name for name in av.codecs_available if name.startswith("pcm_")),
    *("aac", "aac_latm", "ac3", "adpcm_ima_qt", "adpcm_ima_wav", "adpcm_ms", "alac", "amrnb"),
    *("amrwb", "eac3", "flac", "gsm", "gsm_ms", "libopus", "mp2", "mp2float", "mp3", "mp3float"),
    *("opus", "speex", "vorbis", "wmav1", "wmav2"),
}
"""What people usually send, and what FFmpeg decodes without a crash even if it is damaged: 7,000
files with random bytes were tried. Its readers of adx and ast crash within seconds of that."""

SAMPLES = {"u8": "u1", "s16": "i2", "s32": "i4", "s64": "i8", "flt": "f4", "dbl": "f8"}
FULL_SCALES = {"u8": 2**7, "s16": 2**15, "s32": 2**31, "s64": 2**63}
"""NumPy's name of FFmpeg's sample formats, and the whole numbers per unit of amplitude."""

CANCELED = 0.1
"""Share of the power that independent channels would leave in their mean, below which they
cancel each other: a mean 10 dB lower is no accident."""

INAUDIBLE = 1e-8
"""Power of a channel in which there is nothing to be cancelled (-80 dBFS)."""

SHORT = 0.9
"""Part of the length in the header, below which a file counts as incomplete."""

STREAMED_BYTES = 2**31 - 2**16

Block = tuple[np.ndarray, int]


class Unreadable(ValueError):
    """A file holds no sound that can be decoded; the message says why."""


class Rare(Unreadable):
    """A file may hold sound of a rare format or codec."""


def decode(
    file: int,
    suffix: str,
    note: Callable[[str], None],
    check: Callable[[], None],
    everything: bool = False,
) -> Iterator[Block]:
    """The best audio stream of a file, as float32 [samples] of one channel and their rate in Hz.

    Args:
        file: descriptor of a regular file, open for reading. Stays open.
        suffix: of the file's name, such as ".g722", for formats without any mark of their own.
        note: called with a sentence for everything unusual, last.
        check: called at every packet; may raise.
        everything: also decode what is rare, which can crash the process if it is damaged.

    Raises:
        Rare: FFmpeg knows no format for it, or a rare one.
        Unreadable: FFmpeg finds no audio stream in it.
    """
    with _open(file, suffix, everything) as container:
        stream = _best_stream(container, everything)
        if stream.codec_context is None:
            raise Unreadable("its audio has a codec that FFmpeg does not know")
        if not everything and stream.codec_context.name not in COMMON_CODECS:
            raise Rare(f"its audio has the codec {stream.codec_context.name}")
        stream.codec_context.thread_count = 1
        claimed = _wav_seconds(file) or _header_seconds(container, stream)
        packets = _Packets(container, stream, check)
        mixer, timeline = _Mixer(), Timeline(container)
        for gap, frame in timeline.gaps(packets.frames()):
            form = _form(frame)
            if gap or mixer.form not in (None, form):
                yield from mixer.flush()
            yield from _silence(gap, frame.sample_rate)
            mixer.add(frame, form)
            if mixer.full:
                yield from mixer.flush()
        yield from mixer.flush()
        if len(container.streams.audio) > 1:
            note(f"one of its {len(container.streams.audio)} audio tracks was used")
    for text in (*packets.notes(), *mixer.notes(), *timeline.notes()):
        note(text)
    if timeline.seconds < min(SHORT * claimed, claimed - 1):
        note(
            f"{timeline.seconds:.1f} s could be decoded of the {claimed:.1f} s that its header "
            "gives"
        )


def _open(file: int, suffix: str, everything: bool) -> InputContainer:
    """The file as FFmpeg recognizes it by its content, else by the suffix of its name."""
    formats = av.formats_available - FORMATS_OF_REFERENCES if everything else COMMON_FORMATS
    options = {"fd": str(file), "protocol_whitelist": "fd", "format_whitelist": ",".join(formats)}
    if not everything:
        options["codec_whitelist"] = ",".join(COMMON_CODECS)
    reason = ""
    for name in (lambda: None, lambda: _format_named(suffix))[: 1 + everything]:
        os.lseek(file, 0, os.SEEK_SET)
        try:
            return av.open("fd:", format=name(), options=options, metadata_errors="ignore")
        except (av.FFmpegError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
    raise (Unreadable if everything else Rare)(f"not readable as sound ({reason})")


def _best_stream(container: InputContainer, everything: bool) -> av.AudioStream:
    """As ffmpeg's own program chooses: the default one, else the one with most channels."""

    def channels(stream: av.AudioStream) -> int:
        return 1 if stream.codec_context is None else stream.codec_context.layout.nb_channels

    streams = [stream for stream in container.streams.audio if channels(stream)]
    if not streams:
        raise (Unreadable if everything else Rare)("no audio track in it")
    default = [stream for stream in streams if stream.disposition & Disposition.default]
    return max(default or streams, key=channels)


def _format_named(suffix: str) -> str | None:
    """The first format that FFmpeg reads from files with this suffix."""
    for name in sorted(av.formats_available - FORMATS_OF_REFERENCES):
        with contextlib.suppress(ValueError):  # written only
            if suffix.lower().removeprefix(".") in av.ContainerFormat(name, "r").extensions:
                return name
    return None


def _header_seconds(container: InputContainer, stream: av.AudioStream) -> float:
    """The length that the file claims, 0 if it claims none.

    Where it does not, FFmpeg divides the size by the bit rate of the beginning.
    """
    if container.format.name in ("aac", "mp3") and not stream.start_time:  # MP3 without Xing's
        return 0.0
    if stream.duration is not None and stream.time_base is not None:
        seconds = float(stream.duration * stream.time_base)
    elif container.duration is not None and len(container.streams) == 1:
        seconds = (container.duration - max(0, container.start_time or 0)) / av.time_base
    else:
        return 0.0
    bits = sum(getattr(s.codec_context, "bit_rate", None) or 0 for s in container.streams)
    computed = abs(seconds * bits - 8 * container.size) < 0.05 * 8 * container.size
    return 0.0 if computed else seconds


def _wav_seconds(file: int) -> float:
    """The length that a PCM wav claims, 0 for any other file.

    FFmpeg gives what a cut file holds. Programs that write to a pipe claim 2 GiB or more.
    """
    place = os.lseek(file, 0, os.SEEK_CUR)
    try:
        os.lseek(file, 0, os.SEEK_SET)
        with os.fdopen(file, "rb", closefd=False) as content, riff.open(content) as wav:
            frames, rate = wav.getnframes(), wav.getframerate()
            known = frames * wav.getsampwidth() * wav.getnchannels() < STREAMED_BYTES
        return frames / rate if known else 0.0
    except (riff.Error, EOFError, RuntimeError, ZeroDivisionError):
        return 0.0
    finally:
        os.lseek(file, place, os.SEEK_SET)


class _Packets:
    """Decodes the packets of one stream and counts what was lost on the way."""

    def __init__(
        self, container: InputContainer, stream: av.AudioStream, check: Callable[[], None]
    ):
        self._container, self._stream, self._check = container, stream, check
        self._packets = self._damaged = 0
        self._lost = 0.0
        self._cut: str | None = None

    def frames(self) -> Iterator[av.AudioFrame]:
        packets = self._container.demux(self._stream)
        while True:
            self._check()
            try:
                packet = next(packets, None)
            except av.FFmpegError as error:
                self._cut = error.strerror
                packet = None
            if packet is None:
                return
            self._packets += 1
            try:
                frames = packet.decode()
            except av.FFmpegError:
                self._damaged += bool(packet.size)  # NUT ends with an empty one
                if packet.duration is not None:
                    self._lost += float(packet.duration * packet.time_base)
                continue
            for frame in frames:
                if frame.sample_rate not in RATES:
                    raise Unreadable(f"{frame.sample_rate} Hz is no sample rate of sound")
                yield frame

    def notes(self) -> Iterator[str]:
        if self._damaged:
            yield (
                f"{self._damaged} of {self._packets} packets are damaged and were left out "
                f"({self._lost:.2f} s by their headers)"
            )
        if self._cut is not None:
            yield f"reading ended before the end of the file ({self._cut})"


class _Mixer:
    """Collects about a second of frames of one form and mixes their channels to one."""

    def __init__(self) -> None:
        self.form: tuple[int, int, str] | None = None
        self._frames: list[list[np.ndarray]] = []
        self._samples = 0
        self._mixed = self._canceled = 0.0

    @property
    def full(self) -> bool:
        return self.form is not None and self._samples >= self.form[0]

    def add(self, frame: av.AudioFrame, form: tuple[int, int, str]) -> None:
        self.form, (_, channels, name) = form, form
        # AudioFrame.to_ndarray does not know 64-bit whole numbers.
        dtype = SAMPLES[name.removesuffix("p")]
        planar = name.endswith("p")
        count = frame.samples * (1 if planar else channels)
        # AudioFrame.planes reads behind the end of what FFmpeg gives if there are 8 or more.
        planes = (AudioPlane(frame, index) for index in range(channels if planar else 1))
        self._frames.append([np.frombuffer(plane, dtype, count) for plane in planes])
        self._samples += frame.samples

    def flush(self) -> Iterator[Block]:
        if self.form is None or not self._samples:
            return
        rate, channels, format_name = self.form
        planes = [np.concatenate(pieces) for pieces in zip(*self._frames, strict=True)]
        self._frames, self._samples, self.form = [], 0, None
        if len(planes) < channels:  # interleaved
            planes = [planes[0][channel::channels] for channel in range(channels)]
        floats = [_as_float(plane, format_name.removesuffix("p")) for plane in planes]
        yield self._mix(floats, rate), rate

    def _mix(self, channels: list[np.ndarray], rate: int) -> np.ndarray:
        """The mean of the channels, or the loudest of them if they cancel each other."""
        if len(channels) == 1:
            return channels[0]
        mean = functools.reduce(np.add, channels) / np.float32(len(channels))
        self._mixed += len(mean) / rate
        powers = [_variance(channel) for channel in channels]
        if not _variance(mean) < CANCELED * sum(powers) / len(channels) ** 2:
            return mean
        # What is left of a constant value by rounding is no sound.
        powers = [float(np.var(channel, dtype=np.float64)) for channel in channels]
        if max(powers) < INAUDIBLE:
            return mean
        self._canceled += len(mean) / rate
        return channels[int(np.argmax(powers))]

    def notes(self) -> Iterator[str]:
        if self._canceled:
            yield (
                f"its channels cancel each other in {self._canceled:.1f} of {self._mixed:.1f} s; "
                "the loudest one was used there"
            )


def _form(frame: av.AudioFrame) -> tuple[int, int, str]:
    """Rate in Hz, number of channels and sample format."""
    return frame.sample_rate, frame.layout.nb_channels, frame.format.name


def _as_float(samples: np.ndarray, format_name: str) -> np.ndarray:
    """float32, with whole numbers scaled to [-1, 1)."""
    scale = FULL_SCALES.get(format_name)
    if scale is None:
        with np.errstate(over="ignore"):  # becomes infinite, which the caller refuses
            return samples.astype(np.float32)
    if format_name == "u8":
        samples = samples.astype(np.int16) - 2**7
    wide = np.float32 if scale <= 2**15 else np.float64
    return (samples.astype(wide) / wide(scale)).astype(np.float32, copy=False)


def _variance(samples: np.ndarray) -> float:
    return float(np.dot(samples, samples)) / len(samples) - float(samples.mean()) ** 2


def _silence(seconds: float, rate: int) -> Iterator[Block]:
    samples = round(seconds * rate)
    for begin in range(0, samples, rate):
        yield np.zeros(min(rate, samples - begin), np.float32), rate
