"""Audio files to waveforms and back, and how loud a waveform is.

The bytes of a file are not trusted. ffmpeg therefore never gets a name to open, only an open
file; formats that make it open further files or sockets are refused; and no more than the
permitted length is ever decoded, whatever the file claims about itself.
"""

from __future__ import annotations

import io
import math
import os
import wave as riff
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from kimia_infer.utils.errors import RequestError
from kimia_infer.utils.files import no_file, replacing

if TYPE_CHECKING:
    from torch import Tensor
    from torchcodec import AudioSamples
    from torchcodec.decoders import AudioDecoder

SAMPLE_RATE = 16_000
"""Samples per second of every waveform that enters the model (published configuration)."""

ADVICE = "send a file with sound in a format that ffmpeg reads, such as wav, mp3, flac, ogg or m4a"

PROBE_BYTES = 1 << 20
"""ffmpeg recognizes a format by at most this many bytes (its published PROBE_BUF_MAX)."""

PLAYLIST_MARKS = (
    b"#extm3u",  # HLS
    b"ffconcat version",
    b"dash:profile",  # MPEG-DASH
    b"profile:dash",
    b"<compositionplaylist",  # IMF
    b"c=in ip",  # SDP
)
"""Marks, in lower case, by which ffmpeg recognizes formats that only point to other files."""

RANGE_BYTES = 512 << 20
"""Bytes decoded at a time. 48 kHz stereo of 20 minutes fits, and is decoded at once."""

NO_SAMPLES = "No audio frames were decoded"
"""How torchcodec reports that a range, or a file, has no samples."""

MAX_PEAK = 8.0
"""Amplitude (full scale 1) beyond which samples cannot be normalized audio."""


FULL_SCALE = 32_768
"""Step count of 16-bit PCM per unit of amplitude, in reading and in writing."""

LEVEL_WINDOW_SECONDS = 0.1
"""Loudness is measured over windows of about a syllable's length."""

SILENCE_DBFS = -70.0
"""Audio whose loudest window is quieter counts as silent.

That is an RMS of ten steps of 16-bit PCM: above digital silence, dither and the noise of a muted
microphone (-100 to -80 dBFS), and far below the quietest recordings of speech that can still
be understood (about -50 dBFS). The loudest window counts, not the mean, so that one word in
minutes of silence is not lost.
"""

FLOOR_DBFS = -120.0
"""The lowest level that is reported, so that digital silence has a finite one."""


class AudioError(RequestError):
    """Audio cannot be used; the message says why and what to send."""


class AudioTooLong(AudioError):
    """Audio is longer than permitted."""


def load_audio(
    source: str | os.PathLike[str] | bytes,
    max_seconds: float | None = None,
    sample_rate: int = SAMPLE_RATE,
) -> np.ndarray:
    """Decode an audio file, given by path or as its content.

    Channels are averaged and other rates resampled with soxr HQ, as the published
    implementation does. Overshoot beyond [-1, 1] from resampling or lossy coding is kept.
    16-bit PCM mono wav files at the wanted rate are read without ffmpeg.

    Args:
        source: local regular file, or the content of one. The name does not matter.
        max_seconds: refuse longer audio, without decoding more than that.
        sample_rate: samples per second of the result.

    Returns:
        float32 [samples] at ``sample_rate``, nominally within [-1, 1], at least one sample.

    Raises:
        AudioError: no such file, no audio in it, or samples that are not finite.
        AudioTooLong: longer than ``max_seconds``.
        ImportError: the file needs torchcodec, ffmpeg or soxr, and they are not installed.
    """
    if isinstance(source, bytes):
        return _load(io.BytesIO(source), "audio data", max_seconds, sample_rate)
    if not os.path.isfile(source):
        raise AudioError(f"{no_file(source)}; {ADVICE}")
    path = Path(source)
    try:
        with path.open("rb") as file:
            return _load(file, str(path), max_seconds, sample_rate)
    except OSError as error:
        raise AudioError(f"{path}: cannot be read ({error.strerror})") from error


def _load(file: BinaryIO, name: str, max_seconds: float | None, sample_rate: int) -> np.ndarray:
    head = file.read(PROBE_BYTES).lower()
    if not head:
        raise AudioError(f"{name}: empty file; {ADVICE}")
    wave = _read_pcm16(file, name, max_seconds, sample_rate)
    if wave is None:
        if any(mark in head for mark in PLAYLIST_MARKS):
            raise AudioError(f"{name}: a playlist, which only names other files; {ADVICE}")
        wave = _decode(file, name, max_seconds, sample_rate)
    if wave.size == 0:
        raise AudioError(f"{name}: no sound in it (zero samples); {ADVICE}")
    peak = np.abs(wave).max()
    if not np.isfinite(peak):
        raise AudioError(f"{name}: samples that are not finite (NaN or infinite); {ADVICE}")
    if peak > MAX_PEAK:
        raise AudioError(
            f"{name}: samples reach {peak:g}, full scale is 1; divide floating point samples "
            "by their full scale before sending them"
        )
    return wave


def _read_pcm16(
    file: BinaryIO, name: str, max_seconds: float | None, sample_rate: int
) -> np.ndarray | None:
    """The samples of a plain wav that has the wanted rate; None for anything else."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    try:
        with riff.open(file, "rb") as reader:
            form = (reader.getnchannels(), reader.getsampwidth(), reader.getframerate())
            frames = reader.getnframes()
            if form != (1, 2, sample_rate) or not 0 < 2 * frames <= size - file.tell():
                return None
            if max_seconds is not None and frames > max_seconds * sample_rate:
                raise _too_long(name, max_seconds, frames / sample_rate)
            pcm = np.frombuffer(reader.readframes(frames), "<i2")
    except (riff.Error, EOFError, RuntimeError):
        return None
    return pcm.astype(np.float32) / np.float32(FULL_SCALE)


def _decode(file: BinaryIO, name: str, max_seconds: float | None, sample_rate: int) -> np.ndarray:
    """The best audio stream of anything that ffmpeg reads, as [samples] at ``sample_rate``."""
    try:
        from torchcodec.decoders import AudioDecoder
    except (ImportError, RuntimeError, OSError) as error:
        raise ImportError(
            f"{name}: only 16-bit PCM, {sample_rate} Hz, mono wav is read without torchcodec "
            "and the ffmpeg libraries; install both"
        ) from error
    file.seek(0)
    try:
        # The content, not the file: for a file object torchcodec calls back into Python from
        # its own code, which deadlocks in threads that a host such as Cog's worker attaches.
        decoder = AudioDecoder(file.read())
    except ValueError as error:  # torchcodec found no stream of the kind it was asked for
        raise AudioError(f"{name}: no audio track in it; {ADVICE}") from error
    except RuntimeError as error:
        raise AudioError(f"{name}: not readable as sound ({_reason(error)}); {ADVICE}") from error
    rate = decoder.metadata.sample_rate
    if rate is None:
        raise AudioError(f"{name}: its sample rate is unknown; {ADVICE}")
    try:
        pieces = _mono_pieces(decoder, rate, name, max_seconds)
        return _resample(pieces, rate, sample_rate)
    except RuntimeError as error:
        if NO_SAMPLES in str(error):
            raise AudioError(f"{name}: no sound in it (zero samples); {ADVICE}") from error
        raise AudioError(
            f"{name}: cannot be decoded, perhaps damaged or incomplete ({_reason(error)}); {ADVICE}"
        ) from error


def _reason(error: RuntimeError) -> str:
    """The message within torchcodec's "function, source file:line, message"."""
    return str(error).split(", ", 2)[-1].splitlines()[0]


def _mono_pieces(
    decoder: AudioDecoder, rate: int, name: str, max_seconds: float | None
) -> Iterator[np.ndarray]:
    """The channel mean, at the stream's own rate, in ranges of bounded size.

    Lengths in headers are estimates for some formats and lies in others, so the samples
    that really come out are counted. One range suffices for all usual rates and channels.
    """
    if max_seconds is None:
        yield _mean(decoder.get_all_samples())
        return
    about = decoder.metadata
    begin = about.begin_stream_seconds_from_header or 0.0
    # One second more than permitted tells a wave that just fits from a longer one.
    limit = max_seconds + 1.0
    step = min(limit, RANGE_BYTES / (4 * rate * (about.num_channels or 1)))
    total = 0
    for index in range(math.ceil(limit / step)):
        start = begin + index * step if index else 0.0
        try:
            samples = decoder.get_samples_played_in_range(start, begin + (index + 1) * step)
        except RuntimeError as error:
            if index and NO_SAMPLES in str(error):
                return
            raise
        total += samples.data.shape[1]
        if total > max_seconds * rate:
            raise _too_long(name, max_seconds, about.duration_seconds_from_header)
        yield _mean(samples)


def _mean(samples: AudioSamples) -> np.ndarray:
    return samples.data.numpy().mean(axis=0)


def _too_long(name: str, max_seconds: float, header_seconds: float | None) -> AudioTooLong:
    claim = f" (its header says {header_seconds:.1f} s)" if header_seconds else ""
    return AudioTooLong(
        f"{name}: longer than the permitted {max_seconds:g} s{claim}; send a shorter piece"
    )


def _resample(pieces: Iterable[np.ndarray], rate: int, wanted: int) -> np.ndarray:
    """Join float32 pieces at ``rate`` and bring them to the wanted one with soxr HQ."""
    if rate == wanted:
        return np.concatenate(list(pieces))
    try:
        import soxr
    except ImportError as error:
        raise ImportError(f"sound at {rate} Hz needs the package soxr; install it") from error
    stream = soxr.ResampleStream(rate, wanted, 1, dtype="float32", quality="HQ")
    resampled, total = [], 0
    for piece in pieces:
        resampled.append(stream.resample_chunk(piece))
        total += piece.size
    resampled.append(stream.resample_chunk(np.empty(0, np.float32), last=True))
    # The published loader rounds the length up, in floating point, and pads with zeros.
    length = math.ceil(total * (wanted / rate))
    wave = np.concatenate(resampled)[:length]
    return np.pad(wave, (0, length - wave.size))


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
    pcm = _quantize(wave)
    file = io.BytesIO()
    with riff.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(pcm.itemsize)
        writer.setframerate(sample_rate)
        writer.writeframes(pcm.tobytes())
    return file.getvalue()


def _quantize(wave: Tensor | np.ndarray) -> np.ndarray:
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

    Windows follow each other every 50 ms, the last ends with the wave; a shorter wave is one
    window. ValueError if there are no samples.
    """
    if not len(wave):
        raise ValueError("audio without samples has no level")
    half = min(len(wave), max(1, round(LEVEL_WINDOW_SECONDS * sample_rate / 2)))
    blocks = wave[: len(wave) // half * half].reshape(-1, half)
    energy = np.einsum("ij,ij->i", blocks, blocks, dtype=np.float64)  # without a copy
    pairs = energy[:-1] + energy[1:]
    last = np.square(wave[-2 * half :], dtype=np.float64).mean()
    power = max(last, pairs.max(initial=0.0) / (2 * half))
    return max(FLOOR_DBFS, 10 * float(np.log10(power))) if power > 0 else FLOOR_DBFS


def is_silent(level_dbfs: float) -> bool:
    """Whether audio of that loudest level counts as silent."""
    return level_dbfs < SILENCE_DBFS
