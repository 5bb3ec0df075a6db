"""Waveforms as wav files."""

from __future__ import annotations

import io
import os
import uuid
import wave as riff
from pathlib import Path

import numpy as np
from torch import Tensor

FULL_SCALE = 32_768
"""Step count of 16-bit PCM per unit of amplitude; reading divides by the same number."""


def write_wav(
    path: str | os.PathLike[str], wave: Tensor | np.ndarray, sample_rate: int = 24_000
) -> None:
    """Write floating point samples [samples] or [1, samples] as mono 16-bit PCM.

    Amplitudes beyond [-1, 1] are clipped. The file appears under its name only when it is
    complete, replacing an earlier one.

    Raises:
        ValueError: another shape, not floating point, or samples that are not finite.
    """
    content = wav_bytes(wave, sample_rate)
    path = Path(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with partial.open("xb") as file:
            file.write(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def wav_bytes(wave: Tensor | np.ndarray, sample_rate: int = 24_000) -> bytes:
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
    if isinstance(wave, Tensor):
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
