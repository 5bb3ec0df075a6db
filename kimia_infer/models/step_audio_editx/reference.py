"""A recording to what the model is given of it, kept for the next request."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kimia_infer.audio.files import AudioError, Check, Note, silence_of
from kimia_infer.audio.native import load_native
from kimia_infer.models.step_audio_editx import frontend
from kimia_infer.models.step_audio_editx.checkpoint import Networks
from kimia_infer.models.step_audio_editx.packing import (
    TOKENS_PER_SECOND,
    aligned_mel,
    flow_rows,
    interleave,
)

LONGEST_SECONDS = 30.0
SHORTEST_SECONDS = 0.5
LOWEST_RATE = 16_000
"""Hz; the published code refuses less, too."""

KEPT = 16
"""References that are kept, about half a megabyte each."""

Source = str | os.PathLike[str] | bytes

Timed = Callable[[str], AbstractContextManager[object]]
"""Makes what measures the time of the stage of that name."""


@dataclass(frozen=True)
class Reference:
    """A recording as the model hears it.

    ``tokens`` are audio tokens, ``rows`` int64 [rows, 2] those of the flow, ``mel`` float32
    [2 * rows, 80] and ``speaker`` float32 [192] are on the device of the networks. ``ends`` are
    the samples that the name of the speaker is made from.
    """

    tokens: list[int]
    rows: Tensor
    mel: Tensor
    speaker: Tensor
    ends: np.ndarray

    @property
    def seconds(self) -> float:
        """Of its sound, without silent ends."""
        return len(self.tokens) / TOKENS_PER_SECOND


class ReferenceReader:
    """Reads references; the last ones are kept, by their samples."""

    def __init__(self, networks: Networks):
        self._networks = networks
        self._kept: dict[bytes, Reference] = {}
        self._lock = threading.Lock()

    @torch.inference_mode()
    def read(
        self,
        source: Source,
        note: Note,
        check: Check = lambda: None,
        timed: Timed = nullcontext,
    ) -> Reference:
        """The reference in an audio file; raises what :func:`load_reference` does.

        ``check`` is called between stages, and raises to end them; ``timed`` gets their names.
        """
        wave, rate = load_reference(source, note, check)
        key = hashlib.sha256(wave.tobytes() + str(rate).encode()).digest()
        with self._lock:
            found = self._kept.pop(key, None)
        if found is None:
            found = self._read(torch.from_numpy(wave), rate, check, timed)
        with self._lock:
            self._kept[key] = found  # last, as the one that was used last
            while len(self._kept) > KEPT:
                del self._kept[next(iter(self._kept))]
        return found

    def _read(self, wave: Tensor, rate: int, check: Check, timed: Timed) -> Reference:
        networks, device = self._networks, self._networks.language_model.device
        ends = torch.cat([wave[:1000], wave[-1000:]])
        with timed("front_end"):
            leveled = frontend.limit_level(wave)
            heard = frontend.tokenizer_wave(leveled, rate).to(device)
            mel = frontend.prompt_mel(leveled, rate)
            features = frontend.speaker_features(leveled, rate)
        check()
        with timed("vq02"):
            first = networks.vq02([heard])[0]
        check()
        with timed("vq06"):
            second = networks.vq06(heard)
        check()
        with timed("speaker"):
            speaker = networks.speaker(features)
        tokens = interleave(first, second)
        rows = flow_rows(tokens)
        mel = aligned_mel(mel, len(rows))
        rows, mel, speaker = (value.to(device) for value in (rows, mel, speaker))
        return Reference(tokens, rows, mel, speaker, ends.numpy())


def load_reference(
    source: Source, note: Note = lambda text: None, check: Check = lambda: None
) -> tuple[np.ndarray, int]:
    """The samples of an audio file, float32 [samples], and their rate in Hz.

    Args:
        source: the file, given by path or as its content.

    Raises:
        AudioError: naming ``audio``: not audio, silent, below 16 kHz, or not of 0.5 to 30
            seconds.
    """
    try:
        wave, rate = load_native(source, LONGEST_SECONDS, note=note, check=check)
        _require(wave, rate)
    except AudioError as error:
        # A path says which file is meant; content has no name but that of the field.
        raise type(error)(f"audio: {str(error).removeprefix('audio data: ')}") from error
    return wave, rate


def _require(wave: np.ndarray, rate: int) -> None:
    """Raise AudioError unless a recording can be a reference."""
    seconds = len(wave) / rate
    if rate < LOWEST_RATE:
        raise AudioError(
            f"recorded at {rate} Hz, which lacks much of a voice; send one of at least "
            f"{LOWEST_RATE} Hz"
        )
    if seconds < SHORTEST_SECONDS:
        raise AudioError(
            f"{seconds:.2f} s long; send {SHORTEST_SECONDS:g} to {LONGEST_SECONDS:g} s of one "
            "person speaking"
        )
    if silence := silence_of(wave, rate):
        raise AudioError(f"the recording {silence}; send one in which somebody speaks")
