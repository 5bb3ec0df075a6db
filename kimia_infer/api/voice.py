"""A recording to a reference voice for the speech of an answer."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kimia_infer.audio.files import (
    SAMPLE_RATE,
    AudioError,
    Check,
    Note,
    load_audio,
    silence_of,
)
from kimia_infer.audio.mel import MelConfig, log_mel
from kimia_infer.models.kimi_audio.detokenizer import Voice
from kimia_infer.models.kimi_audio.encoders import CODE_SAMPLES, SpeechCodes
from kimia_infer.models.kimi_audio.prompt import AudioSource
from kimia_infer.utils.files import no_file

if TYPE_CHECKING:
    from kimia_infer.api.loading import Components

log = logging.getLogger(__name__)

Call = Callable[[Callable[[], Tensor]], Tensor]
"""Has a function called by the thread that owns the device, and returns its result."""

MIN_SECONDS = 1.0
MAX_SECONDS = 30.0
"""One segment of the speech tokenizer. The detokenizer remembers the last 18 s (900 frames)."""

KEPT = 16
"""Voices that are kept, half a megabyte each at most."""


class VoiceReader:
    """Reads reference voices; the last ones are kept, as callers tend to send the same again.

    ``vocoder_folder`` is the checkpoint folder whose ``config.json`` describes the mel
    spectrogram, ``frames_per_code`` how many of its frames a code spans.
    """

    def __init__(self, speech_codes: SpeechCodes, vocoder_folder: Path, frames_per_code: int):
        self._speech_codes, self._frames_per_code = speech_codes, frames_per_code
        self._folder = vocoder_folder
        self._kept: dict[bytes, tuple[Voice, list[str]]] = {}
        self._lock = threading.Lock()

    @classmethod
    def of(cls, components: Components) -> VoiceReader | None:
        """The reader that loaded components have; None without a vocoder, whose mel it needs."""
        if components.detokenizer is None or components.vocoder_folder is None:
            return None
        frames = components.detokenizer.config.frames_per_code
        return cls(components.speech_tokenizer, components.vocoder_folder, frames)

    @torch.inference_mode()
    def read(
        self,
        source: AudioSource,
        call: Call,
        note: Note = log.warning,
        check: Check | None = None,
    ) -> Voice:
        """The voice in an audio file, given by path or as its content.

        It is cut to whole codes, which are computed through ``call``. ``note`` and ``check`` are
        those of ``load_audio``. Raises RequestError naming ``voice`` for a recording that is not
        audio, silent, or not of 1 to 30 seconds.
        """
        key = _digest(source)
        with self._lock:
            kept = self._kept.pop(key, None)
        if kept is None:
            notes: list[str] = []
            try:
                kept = self._read(source, call, notes.append, check), notes
            except AudioError as error:
                raise type(error)(f"voice: {error}") from error
        with self._lock:
            self._kept[key] = kept  # last, as the one that was used last
            while len(self._kept) > KEPT:
                del self._kept[next(iter(self._kept))]
        voice, notes = kept
        for text in notes:
            note(f"voice: {text}")
        return voice

    def _read(self, source: AudioSource, call: Call, note: Note, check: Check | None) -> Voice:
        wave = _load(source, note, check)
        config = MelConfig.from_directory(self._folder)
        resampled = load_audio(
            source, MAX_SECONDS, config.sample_rate, note=lambda text: None, check=check
        )
        mel = log_mel(torch.from_numpy(resampled), config)
        count = min(len(wave) // CODE_SAMPLES, len(mel) // self._frames_per_code)
        wave = wave[: count * CODE_SAMPLES]
        codes = call(lambda: self._speech_codes.encode(wave).cpu())
        tokens = codes.repeat_interleave(self._frames_per_code)
        return Voice(mel[: len(tokens)], tokens)


def check_recording(path: Path) -> None:
    """Raise AudioError if the file cannot be a reference voice, as :class:`VoiceReader` does."""
    try:
        _load(path, lambda text: None, None)
    except AudioError as error:
        raise type(error)(f"{path}: {error}") from error


def _load(source: AudioSource, note: Note, check: Check | None) -> np.ndarray:
    """The recording at 16 kHz, float32 [samples]; raises AudioError if it is no voice."""
    wave = load_audio(source, MAX_SECONDS, note=note, check=check)
    if len(wave) < MIN_SECONDS * SAMPLE_RATE:
        raise AudioError(
            f"{len(wave) / SAMPLE_RATE:.2f} s long; send {MIN_SECONDS:g} to "
            f"{MAX_SECONDS:g} s of one person speaking"
        )
    if silence := silence_of(wave, SAMPLE_RATE):
        raise AudioError(f"the recording {silence}; send one in which somebody speaks")
    return wave


def _digest(source: AudioSource) -> bytes:
    """The SHA-256 of a file, given by path or as its content."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).digest()
    if not os.path.isfile(source):
        raise AudioError(f"voice: {no_file(source)}; send a recording")
    try:
        with open(source, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise AudioError(f"voice: {source} cannot be read ({error.strerror})") from error
