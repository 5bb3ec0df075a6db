"""Sound that is in memory already, as the content of a wav file.

What reads files then reads it, too, and by the same rules: channels, rates and levels of an array
are treated as those of a file that holds the same samples.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np

from kimia_infer.audio import RATES
from kimia_infer.audio.files import MAX_PEAK, AudioError

FORMS = "{'array': samples, 'sampling_rate': hertz} or (samples, hertz)"

MAX_CHANNELS = 32
"""More channels than any common layout has (22.2 surround has 24)."""

INTEGER, FLOAT = 1, 3
"""Format tags of wav files."""

ENCODINGS = {
    np.dtype(np.int16): ("<i2", INTEGER),
    np.dtype(np.int32): ("<i4", INTEGER),
    np.dtype(np.uint8): ("u1", INTEGER),
}
"""PCM by the type of an array; floating point is stored with 32 bits."""


def is_sound(value: Any) -> bool:
    """Whether ``value`` has one of the forms of sound in memory, not whether it can be used."""
    return isinstance(value, Mapping | tuple) or hasattr(value, "get_all_samples")


def wav_content(sound: Any) -> bytes:
    """The wav file that holds a sound in memory, in the precision of its samples.

    Args:
        sound: ``{"array": samples, "sampling_rate": hertz}``, as data sets hold it (other keys are
            not used), ``(samples, hertz)``, or a decoder of torchcodec. Samples are a numpy array,
            a tensor or a list: floating point with full scale 1, or PCM of the type int16, int32
            or uint8; mono [samples], [channels, samples], or [samples, channels].

    Raises:
        AudioError: another form, type, shape or rate; no samples; samples that are not finite.
    """
    array, rate = _parts(sound)
    rate = _rate(rate)
    frames = _frames(_samples(array))
    if not frames.size:
        raise AudioError("array: no sound in it (zero samples)")
    if frames.dtype.kind == "f":
        with np.errstate(over="ignore"):  # beyond float32 is refused as infinite
            frames = frames.astype("<f4")
        _check_level(frames)
        tag = FLOAT
    elif frames.dtype.newbyteorder("=") in ENCODINGS:
        encoding, tag = ENCODINGS[frames.dtype.newbyteorder("=")]
        frames = frames.astype(encoding)
    else:
        raise AudioError(
            "array: expected samples of a floating point type, int16, int32 or uint8, found "
            f"{frames.dtype}"
        )
    return _wav(np.ascontiguousarray(frames), tag, rate)


def _parts(sound: Any) -> tuple[Any, Any]:
    """The samples and the rate."""
    if isinstance(sound, Mapping):
        for name in ("array", "sampling_rate"):
            if sound.get(name) is None:
                raise AudioError(f"{name}: missing; sound in memory is {FORMS}")
        return sound["array"], sound["sampling_rate"]
    if hasattr(sound, "get_all_samples"):  # data sets since version 4 hold these
        decoded = sound.get_all_samples()
        return decoded.data, decoded.sample_rate
    if len(sound) != 2:
        raise AudioError(f"expected {FORMS}, found a tuple of {len(sound)}")
    if isinstance(sound[0], Real) and not isinstance(sound[1], Real):
        raise AudioError("expected (samples, hertz), found the rate first; swap them")
    return sound


def _rate(value: Any) -> int:
    number = value.item() if getattr(value, "ndim", None) == 0 else value  # of numpy or PyTorch
    whole = type(number) is int or (isinstance(number, float) and number.is_integer())
    if not whole or number not in RATES:
        raise AudioError(
            f"sampling_rate: expected whole hertz from {RATES[0]} to {RATES[-1]}, found "
            f"{str(value)[:60]!r}"
        )
    return int(number)


def _samples(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):  # a tensor, also one on a device or in bfloat16
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()
    try:
        return np.asarray(value)
    except (TypeError, ValueError) as error:  # lists of different lengths, for one
        raise AudioError("array: expected a numpy array, a tensor or a list of samples") from error


def _frames(samples: np.ndarray) -> np.ndarray:
    """[samples, channels]. The shorter axis has the channels, if it can only be that one."""
    shape = list(samples.shape)
    if samples.ndim == 1:
        return samples[:, None]
    if samples.ndim != 2:
        raise AudioError(
            f"array: expected the shape [samples] or [channels, samples], found {shape}"
        )
    first, last = (0 < size <= MAX_CHANNELS for size in shape)
    if 1 in shape:
        first, last = shape[0] == 1, shape[0] != 1
    if first == last and samples.size:
        raise AudioError(
            f"array: which axis of the shape {shape} has the channels cannot be told (there are "
            f"at most {MAX_CHANNELS}); give one channel, or their mean, as [samples]"
        )
    return samples.T if first else samples


def _check_level(frames: np.ndarray) -> None:
    peak = np.abs(frames).max()
    if not np.isfinite(peak):
        raise AudioError("array: samples that are not finite (NaN or infinite)")
    if peak > MAX_PEAK:
        raise AudioError(
            f"array: samples reach {peak:g}, full scale is 1; divide floating point samples by "
            "their full scale"
        )


def _wav(frames: np.ndarray, tag: int, rate: int) -> bytes:
    """The file of [samples, channels]. Sizes beyond 4 GiB are those of a stream's header."""
    width = frames.itemsize * frames.shape[1]
    most = 2**32 - 1
    size = frames.nbytes if frames.nbytes < most - 36 else most
    form = struct.pack(
        "<4sIHHIIHH",
        *(b"fmt ", 16, tag, frames.shape[1], rate),
        *(min(rate * width, most), width, 8 * frames.itemsize),
    )
    header = struct.pack("<4sI4s", b"RIFF", min(size + 36, most), b"WAVE") + form
    return b"".join([header, struct.pack("<4sI", b"data", size), frames.data.cast("B")])
