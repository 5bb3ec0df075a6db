"""Speech to send, and an ear for what comes back."""

from __future__ import annotations

import functools

import numpy as np

from kimia_infer.audio.files import SAMPLE_RATE, load_audio, wav_bytes
from scripts.miniature.espeak import Synthesizer
from scripts.miniature.recognizer import Said, SpeechRecognizer
from scripts.miniature.spoken_world import resampled
from scripts.miniature.voices import Utterance, Voice

VOICE = Voice("en-us+m3", 150, 50)


@functools.cache
def spoken(text: str) -> bytes:
    """``text`` as espeak-ng says it, a wav file."""
    wave = _synthesizer().speak(Utterance(text, VOICE)).wave
    return wav_bytes(resampled(wave, SAMPLE_RATE), SAMPLE_RATE)


def heard(sound: bytes, said: Said = "answer") -> str:
    """The words in a file with sound."""
    return heard_in(load_audio(sound), said)


def heard_in(wave: np.ndarray, said: Said = "answer") -> str:
    """The words in a wave, float32 [samples] at 16 kHz."""
    return _recognizer().hear(wave, said)


@functools.cache
def _synthesizer() -> Synthesizer:
    return Synthesizer()


@functools.cache
def _recognizer() -> SpeechRecognizer:
    return SpeechRecognizer()
