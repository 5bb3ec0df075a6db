"""A recording to a reference voice for the speech of an answer."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kimia_infer.audio.files import (
    SAMPLE_RATE,
    SILENCE_DBFS,
    AudioError,
    is_silent,
    load_audio,
    loudest_dbfs,
)
from kimia_infer.audio.mel import MelConfig, log_mel
from kimia_infer.models.kimi_audio.detokenizer import Voice
from kimia_infer.models.kimi_audio.prompt import AudioSource
from kimia_infer.models.kimi_audio.speech_tokenizer import SpeechCodes
from kimia_infer.models.kimi_audio.whisper import CODE_SAMPLES
from kimia_infer.utils.files import no_file

if TYPE_CHECKING:
    from kimia_infer.api.loading import Components

MIN_SECONDS = 1.0
MAX_SECONDS = 30.0
"""One segment of the speech tokenizer. The detokenizer remembers the last 18 s (900 frames)."""


class VoiceReader:
    """Reads reference voices; the last one is cached, as callers tend to send the same again.

    ``vocoder_folder`` is the checkpoint folder whose ``config.json`` describes the mel
    spectrogram, ``frames_per_code`` how many of its frames a code spans.
    """

    def __init__(self, speech_codes: SpeechCodes, vocoder_folder: Path, frames_per_code: int):
        self._speech_codes, self._frames_per_code = speech_codes, frames_per_code
        self._folder = vocoder_folder
        self._last: tuple[bytes, Voice] | None = None

    @classmethod
    def of(cls, components: Components) -> VoiceReader | None:
        """The reader that loaded components have; None without a vocoder, whose mel it needs."""
        if components.detokenizer is None or components.vocoder_folder is None:
            return None
        frames = components.detokenizer.config.frames_per_code
        return cls(components.speech_tokenizer, components.vocoder_folder, frames)

    @torch.inference_mode()
    def read(self, source: AudioSource) -> Voice:
        """The voice in an audio file, given by path or as its content.

        It is cut to whole codes. Raises RequestError naming ``voice`` for a recording that is
        not audio, silent, or not of 1 to 30 seconds.
        """
        content = _content(source)
        key = hashlib.sha256(content).digest()
        last = self._last
        if last is not None and last[0] == key:
            return last[1]
        try:
            voice = self._read(content)
        except AudioError as error:
            raise type(error)(f"voice: {error}") from error
        self._last = key, voice
        return voice

    def _read(self, content: bytes) -> Voice:
        wave = load_audio(content, MAX_SECONDS)
        if len(wave) < MIN_SECONDS * SAMPLE_RATE:
            raise AudioError(
                f"{len(wave) / SAMPLE_RATE:.2f} s long; send {MIN_SECONDS:g} to "
                f"{MAX_SECONDS:g} s of one person speaking"
            )
        level = loudest_dbfs(wave, SAMPLE_RATE)
        if is_silent(level):
            raise AudioError(
                f"silent ({level:.0f} dBFS at its loudest, below {SILENCE_DBFS:.0f}); send a "
                "recording in which somebody speaks"
            )
        config = MelConfig.from_directory(self._folder)
        mel = log_mel(
            torch.from_numpy(load_audio(content, MAX_SECONDS, config.sample_rate)), config
        )
        count = min(len(wave) // CODE_SAMPLES, len(mel) // self._frames_per_code)
        codes = self._speech_codes.encode(wave[: count * CODE_SAMPLES]).cpu()
        tokens = codes.repeat_interleave(self._frames_per_code)
        return Voice(mel[: len(tokens)], tokens)


def _content(source: AudioSource) -> bytes:
    if isinstance(source, bytes):
        return source
    if not os.path.isfile(source):
        raise AudioError(f"voice: {no_file(source)}; send a recording")
    try:
        return Path(source).read_bytes()
    except OSError as error:
        raise AudioError(f"voice: {source} cannot be read ({error.strerror})") from error
