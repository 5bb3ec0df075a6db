"""Audio files to waveforms and back, and how loud a waveform is."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import logging
import math
import operator
import os
import wave as riff
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from kimia_infer.utils.errors import RequestError
from kimia_infer.utils.files import nameless_file, no_file, replacing

if TYPE_CHECKING:
    from torch import Tensor

SAMPLE_RATE = 16_000
"""Samples per second of every waveform that enters the model (published configuration)."""

ADVICE = "send a file with sound in a format that ffmpeg reads, such as wav, mp3, flac, ogg or m4a"

PLAIN_SECONDS = 30
"""Plain wav files are read in blocks of this length."""

MOST_CHUNKS = 100  # of a wav file that are looked at

KEPT_SECONDS = 600
"""A longer stream is decoded again when it is read, instead of staying in memory."""

MAX_PEAK = 8.0
"""Amplitude (full scale 1) beyond which samples cannot be normalized audio."""

FULL_SCALE = 32_768
"""Step count of 16-bit PCM per unit of amplitude, in reading and in writing."""

LEVEL_WINDOW_SECONDS = 0.1
"""Loudness is measured over windows of about a syllable's length."""

EDGE_SECONDS = 0.005
"""How long resampling rings at the ends of a recording that does not begin at zero."""

SILENCE_DBFS = -70.0
"""Audio whose loudest window is quieter counts as silent.

That is an RMS of ten steps of 16-bit PCM: above digital silence, dither and the noise of a muted
microphone (-100 to -80 dBFS), and far below the quietest recordings of speech that can still
be understood (about -50 dBFS). The loudest window counts, not the mean, so that one word in
minutes of silence is not lost.
"""

FLOOR_DBFS = -120.0
"""The lowest level that is reported, so that digital silence has a finite one."""


log = logging.getLogger(__name__)

Note = Callable[[str], None]
Check = Callable[[], None]
Block = tuple[np.ndarray, int]  # float32 [samples] of one channel, and their rate in Hz


class AudioError(RequestError):
    """Audio cannot be used; the message says why and what to send."""


class AudioTooLong(AudioError):
    """Audio is longer than permitted."""


def load_audio(
    source: str | os.PathLike[str] | bytes,
    max_seconds: float | None = None,
    sample_rate: int = SAMPLE_RATE,
    *,
    note: Note | None = None,
    check: Check | None = None,
) -> np.ndarray:
    """Decode an audio file, given by path or as its content.

    Channels are averaged and other rates resampled with soxr HQ, as the published
    implementation does; where channels cancel each other, the loudest is used. Overshoot beyond
    [-1, 1] from resampling or lossy coding is kept. What is damaged is left out, and silence fills
    the gaps between the times of a container. 16-bit PCM mono wav files at the wanted rate are
    read without ffmpeg.

    Args:
        source: local regular file, or the content of one. The name matters only for formats
            without any mark of their own.
        max_seconds: refuse longer audio, without decoding more than that.
        sample_rate: samples per second of the result.
        note: called with a sentence for everything unusual, such as damage; by default a
            warning is logged.
        check: called between pieces of well below a second's work; may raise to stop.

    Returns:
        float32 [samples] at ``sample_rate``, nominally within [-1, 1], at least one sample.

    Raises:
        AudioError: no such file, no audio in it, or samples that are not finite.
        AudioTooLong: longer than ``max_seconds``.
        ImportError: the file needs PyAV or soxr, and they are not installed.
    """
    waves = list(Reader(source, max_seconds, sample_rate, note, check or (lambda: None)).waves())
    return waves[0] if len(waves) == 1 else np.concatenate(waves)


class AudioStream:
    """A recording in blocks float32 [samples] of about a second, without all of it in memory.

    Takes the arguments of :func:`load_audio` and raises what that raises, at once: a first pass
    decodes the whole recording. ``seconds`` is its length. It can be iterated repeatedly, as long
    as its file exists.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | bytes,
        max_seconds: float | None = None,
        sample_rate: int = SAMPLE_RATE,
        *,
        note: Note | None = None,
        check: Check | None = None,
    ):
        check = check or (lambda: None)
        self._reader = Reader(source, max_seconds, sample_rate, lambda text: None, check)
        self._kept: list[np.ndarray] = []
        samples = 0
        for wave in Reader(source, max_seconds, sample_rate, note, check).waves():
            samples += len(wave)
            if samples <= KEPT_SECONDS * sample_rate:
                self._kept.append(wave)
            else:
                self._kept.clear()
        self.seconds = samples / sample_rate

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self._kept) if self._kept else self._reader.waves()


@dataclass(frozen=True)
class Reader:
    """One pass over one file, by the rules of :func:`load_audio`."""

    source: str | os.PathLike[str] | bytes
    max_seconds: float | None
    sample_rate: int
    note: Note | None
    check: Check

    @property
    def name(self) -> str:
        return "audio data" if isinstance(self.source, bytes) else os.fspath(self.source)

    def waves(self) -> Generator[np.ndarray]:
        """Blocks float32 [samples] at the wanted rate, checked, at least one sample in all."""
        peak = 0.0
        empty = True
        with self.opened() as file:
            for wave in _resampled(self._limited(self.blocks(file)), self.sample_rate):
                if not wave.size:
                    continue
                peak, empty = max(wave.max(), -wave.min()), False
                if not np.isfinite(peak):
                    raise self._refusal("samples that are not finite (NaN or infinite)")
                if peak > MAX_PEAK:
                    raise AudioError(
                        f"{self.name}: samples reach {peak:g}, full scale is 1; divide floating "
                        "point samples by their full scale before sending them"
                    )
                yield wave
        if empty:
            raise self._refusal("no sound in it (zero samples)")

    def _note(self, text: str) -> None:
        (self.note or functools.partial(log.warning, "%s: %s", self.name))(text)

    def _refusal(self, reason: str) -> AudioError:
        return AudioError(f"{self.name}: {reason}; {ADVICE}")

    @contextlib.contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """The file, open for reading; a content becomes one without a name."""
        if isinstance(self.source, bytes):
            with nameless_file() as file:
                content = memoryview(self.source)
                while content:
                    content = content[file.write(content) :]
                file.seek(0)
                yield file
            return
        if not os.path.isfile(self.source):
            raise AudioError(f"{no_file(self.source)}; {ADVICE}")
        try:
            opened = Path(self.source).open("rb")  # noqa: SIM115 -- closed below
        except OSError as error:
            raise AudioError(f"{self.name}: cannot be read ({error.strerror})") from error
        with opened:
            yield opened

    def blocks(self, file: BinaryIO) -> Iterator[Block]:
        if not os.fstat(file.fileno()).st_size:
            raise self._refusal("empty file")
        if _holds_two(file.fileno()):
            self._note("it holds several sounds one after another, of which one was read")
        plain = _plain_wav(file, self.sample_rate)
        return self._decoded(file) if plain is None else plain

    def _decoded(self, file: BinaryIO) -> Iterator[Block]:
        """The best audio stream of anything that ffmpeg reads."""
        try:
            from kimia_infer.audio.decode import Unreadable, decode
        except ImportError as error:
            raise ImportError(
                f"{self.name}: only 16-bit PCM, {self.sample_rate} Hz, mono wav is read without "
                "PyAV; install the package av"
            ) from error
        suffix = "" if isinstance(self.source, bytes) else Path(self.source).suffix
        try:
            yield from decode(file.fileno(), suffix, self._note, self.check)
        except Unreadable as error:
            raise self._refusal(str(error)) from error

    def _limited(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """``blocks``, until they are longer than permitted.

        Lengths in headers are estimates for some formats and lies in others, so the samples that
        really come out are counted.
        """
        counts: dict[int, int] = {}
        for block in blocks:
            self.check()
            samples, rate = block
            counts[rate] = counts.get(rate, 0) + len(samples)
            if self.max_seconds is not None:
                others = sum(count / other for other, count in counts.items() if other != rate)
                if counts[rate] > (self.max_seconds - others) * rate:
                    raise AudioTooLong(
                        f"{self.name}: longer than the permitted {self.max_seconds:g} s; send a "
                        "shorter piece"
                    )
            yield block


def _plain_wav(file: BinaryIO, sample_rate: int) -> Iterator[Block] | None:
    """The blocks of a 16-bit PCM mono wav that has the wanted rate; None for anything else."""
    size = os.fstat(file.fileno()).st_size
    try:
        reader = riff.open(file, "rb")  # noqa: SIM115 -- the caller closes the file
        form = (reader.getnchannels(), reader.getsampwidth(), reader.getframerate())
        frames = reader.getnframes()
        if form != (1, 2, sample_rate) or not 0 < 2 * frames <= size - file.tell():
            return None
    except (riff.Error, EOFError, RuntimeError):
        return None

    def blocks() -> Iterator[Block]:
        step = PLAIN_SECONDS * sample_rate
        for begin in range(0, frames, step):
            pcm = reader.readframes(min(step, frames - begin))
            samples = np.frombuffer(pcm, "<i2", len(pcm) // 2)  # chunks may end within one
            yield samples.astype(np.float32) / np.float32(FULL_SCALE), sample_rate

    return blocks()


def _holds_two(file: int) -> bool:
    """Whether a wav file has another sound behind its own; ffmpeg reads one of them."""
    place, found = 12, False
    for _ in range(MOST_CHUNKS if os.pread(file, 4, 0) == b"RIFF" else 0):
        head = os.pread(file, 8, place)
        if found and head[:4] in (b"RIFF", b"data"):
            return True
        size = int.from_bytes(head[4:], "little")
        found = found or head[:4] == b"data"
        place += 8 + size + size % 2
    return False


def _resampled(blocks: Iterable[Block], wanted: int) -> Iterator[np.ndarray]:
    """Bring blocks to the wanted rate with soxr HQ; whenever their rate changes, it starts anew."""
    for rate, group in itertools.groupby(blocks, key=operator.itemgetter(1)):
        waves = (samples for samples, _ in group)
        yield from waves if rate == wanted else _resample(waves, rate, wanted)


def _resample(waves: Iterable[np.ndarray], rate: int, wanted: int) -> Iterator[np.ndarray]:
    try:
        import soxr
    except ImportError as error:
        raise ImportError(f"sound at {rate} Hz needs the package soxr; install it") from error
    stream = soxr.ResampleStream(rate, wanted, 1, dtype="float32", quality="HQ")
    read = written = 0
    for wave in waves:
        resampled = stream.resample_chunk(wave)
        read, written = read + len(wave), written + len(resampled)
        yield resampled
    # The published loader rounds the length up, in floating point, and pads with zeros.
    rest = max(0, math.ceil(read * (wanted / rate)) - written)
    last = stream.resample_chunk(np.empty(0, np.float32), last=True)[:rest]
    yield np.pad(last, (0, rest - len(last)))


def write_wav(path: str | os.PathLike[str], wave: Tensor | np.ndarray, sample_rate: int) -> None:
    """Write floating point samples [samples] or [1, samples] as mono 16-bit PCM.

    Amplitudes beyond [-1, 1] are clipped. The file appears under its name only when it is
    complete, replacing an earlier one.

    Raises:
        ValueError: another shape, not floating point, or samples that are not finite.
    """
    content = wav_bytes(wave, sample_rate)
    with replacing(Path(path)) as partial:
        partial.write_bytes(content)


def wav_bytes(wave: Tensor | np.ndarray, sample_rate: int) -> bytes:
    """The file that :func:`write_wav` writes.

    A sample becomes the same 16 bits whatever stands around it, so the files of consecutive
    pieces hold together what one file would.
    """
    pcm = pcm16(wave)
    file = io.BytesIO()
    with riff.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(pcm.itemsize)
        writer.setframerate(sample_rate)
        writer.writeframes(pcm.tobytes())
    return file.getvalue()


def pcm16(wave: Tensor | np.ndarray) -> np.ndarray:
    """Little-endian int16 [samples]."""
    if not isinstance(wave, np.ndarray):
        wave = wave.detach().cpu()
        wave = (wave.float() if wave.is_floating_point() else wave).numpy()
    if wave.ndim == 2 and wave.shape[0] == 1:
        wave = wave[0]
    if wave.ndim != 1 or not np.issubdtype(wave.dtype, np.floating):
        raise ValueError(
            "wave must be floating point samples of shape [samples] or [1, samples], got "
            f"{wave.dtype} of shape {list(wave.shape)}"
        )
    if not np.isfinite(wave).all():
        raise ValueError("wave holds samples that are not finite")
    scaled = np.rint(wave.astype(np.float64) * FULL_SCALE)
    return np.clip(scaled, -FULL_SCALE, FULL_SCALE - 1).astype("<i2")


def loudest_dbfs(wave: np.ndarray, sample_rate: int) -> float:
    """RMS level of the loudest 100 ms of ``wave`` [samples], in dB of full scale (amplitude 1).

    The mean of a window does not count: nobody hears a constant value. Windows follow each other
    every 50 ms, the last ends with the wave; a shorter wave is one window. The first and last 5 ms
    are left out of all that last more than 100 ms. ValueError if there are no samples.
    """
    if not len(wave):
        raise ValueError("audio without samples has no level")
    edge = round(EDGE_SECONDS * sample_rate)
    if len(wave) > 20 * edge:
        wave = wave[edge:-edge]
    half = min(len(wave), max(1, round(LEVEL_WINDOW_SECONDS * sample_rate / 2)))
    blocks = wave[: len(wave) // half * half].reshape(-1, half)
    energy = np.einsum("ij,ij->i", blocks, blocks, dtype=np.float64)  # without a copy
    means = blocks.mean(axis=1, dtype=np.float64)
    variances = (energy[:-1] + energy[1:]) / (2 * half) - ((means[:-1] + means[1:]) / 2) ** 2
    power = max(np.var(wave[-2 * half :], dtype=np.float64), variances.max(initial=0.0))
    return max(FLOOR_DBFS, 10 * float(np.log10(power))) if power > 0 else FLOOR_DBFS


def is_silent(level_dbfs: float) -> bool:
    """Whether audio of that loudest level counts as silent."""
    return level_dbfs < SILENCE_DBFS


def silence_of(wave: np.ndarray, sample_rate: int) -> str | None:
    """What ``wave`` [samples] does instead of sounding, in words; None if there is sound in it."""
    level = loudest_dbfs(wave, sample_rate)
    if not is_silent(level):
        return None
    if offset := constant_value(wave):
        return f"holds one constant value ({offset:.2g} of full scale), no sound"
    return f"is silent ({level:.0f} dBFS at its loudest, below {SILENCE_DBFS:.0f})"


def constant_value(wave: np.ndarray) -> float:
    """The mean of ``wave`` [samples]; 0 if it is no more than silence may have."""
    mean = float(wave.mean(dtype=np.float64))
    return mean if abs(mean) > 10 ** (SILENCE_DBFS / 20) else 0.0
