"""Waves as what an answer carries: wav files in memory, as data URIs.

Nothing is written to disk: Cog never deletes the output files of a predictor, and turns a
file inside an object into a data URI in any case.
"""

from __future__ import annotations

import base64
import io
import wave as riff

import numpy as np
from torch import Tensor

from kimia_infer.audio.wav import FULL_SCALE

SAMPLE_RATE = 24_000
"""Samples per second of every answer (published configuration)."""


def wav_file(wave: Tensor) -> bytes:
    """float32 [samples] or [1, samples] at 24 kHz -> a mono 16-bit wav file.

    Amplitudes beyond [-1, 1] are clipped. A sample becomes the same 16 bits whatever stands
    around it, so the files of consecutive chunks hold together what one file would.

    Raises ValueError if a sample is not finite.
    """
    samples = wave.detach().float().cpu().reshape(-1).double().numpy()
    if not np.isfinite(samples).all():
        raise ValueError("the wave holds samples that are not finite")
    pcm = np.clip(np.rint(samples * FULL_SCALE), -FULL_SCALE, FULL_SCALE - 1).astype("<i2")
    file = io.BytesIO()
    with riff.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(pcm.itemsize)
        writer.setframerate(SAMPLE_RATE)
        writer.writeframes(pcm.tobytes())
    return file.getvalue()


def wav_uri(wave: Tensor | None) -> str | None:
    """:func:`wav_file` as a data URI; None stays None."""
    if wave is None:
        return None
    return "data:audio/wav;base64," + base64.b64encode(wav_file(wave)).decode("ascii")
