"""Speech synthesis with the espeak-ng library: waveforms and the start of every phoneme."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kimia_infer.utils.errors import ConfigurationError
from scripts.miniature.voices import Utterance, Voice

RATE = 22_050
"""Sample rate of every voice without recorded diphones."""

# From the header speak_lib.h, version 1.51.
SYNCHRONOUS, EVENT_PHONEME = 2, 7
PHONEME_EVENTS, PHONEME_IPA = 1, 2
PARAMETER_RATE, PARAMETER_PITCH = 1, 3
UTF8 = 1

CHUNK = 200
"""Utterances per process. Some voices use random numbers, so that a result depends on those before
it in its process; with chunks of a fixed size it depends on the list alone."""


class Speech(NamedTuple):
    """``wave`` int16 [samples] at 22,050 Hz; ``phones`` in IPA with their first sample.

    The name of a pause is empty.
    """

    wave: np.ndarray
    phones: list[tuple[str, int]]


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("string", ctypes.c_char * 8),
    )


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


class Synthesizer:
    """The library, which a process can initialize once.

    Raises:
        ConfigurationError: it is not installed.
    """

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libespeak-ng.so.1")
        except OSError as error:
            raise ConfigurationError(
                f"espeak-ng is not installed ({error}): apt-get install espeak-ng"
            ) from error
        self._waves: list[np.ndarray] = []
        self._phones: list[tuple[str, int]] = []
        self._callback = _Callback(self._received)  # the library keeps its address
        self._library.espeak_Info.restype = ctypes.c_char_p
        rate = self._library.espeak_Initialize(SYNCHRONOUS, 0, None, PHONEME_EVENTS | PHONEME_IPA)
        if rate != RATE:
            raise ConfigurationError(f"espeak-ng: started with {rate} Hz, expected {RATE}")
        self._library.espeak_SetSynthCallback(self._callback)
        data = ctypes.c_char_p()
        self._library.espeak_Info(ctypes.byref(data))
        self._variants = Path(os.fsdecode(data.value)) / "voices" / "!v"

    def _received(self, wave, count: int, events) -> int:
        if count > 0 and wave:
            self._waves.append(np.ctypeslib.as_array(wave, (count,)).copy())
        index = 0
        while events[index].type:
            if events[index].type == EVENT_PHONEME:
                self._phones.append((events[index].string.decode(), events[index].sample))
            index += 1
        return 0

    def speak(self, utterance: Utterance) -> Speech:
        """Raises ConfigurationError if the voice does not exist or the result is empty."""
        text, voice = utterance
        assert isinstance(voice, Voice)
        self._waves, self._phones = [], []
        # The library ignores a variant that does not exist.
        _, _, variant = voice.name.partition("+")
        known = not variant or (self._variants / variant).is_file()
        if not known or self._library.espeak_SetVoiceByName(voice.name.encode()):
            raise ConfigurationError(f"espeak-ng: no voice {voice.name!r}; see espeak-ng --voices")
        self._library.espeak_SetParameter(PARAMETER_RATE, voice.rate, 0)
        self._library.espeak_SetParameter(PARAMETER_PITCH, voice.pitch, 0)
        data = text.encode()
        self._library.espeak_Synth(data, len(data) + 1, 0, 0, 0, UTF8, None, None)
        if not self._waves:
            raise ConfigurationError(f"espeak-ng: silent for {text!r}")
        return Speech(np.concatenate(self._waves), self._phones)


def speak_all(utterances: Iterable[Utterance], processes: int | None = None) -> Iterator[Speech]:
    """The speech of every utterance, in order; the same for any number of processes."""
    rest = iter(utterances)
    chunks = iter(lambda: list(islice(rest, CHUNK)), [])
    # A new process for every chunk; not forked, since the library has threads.
    with ProcessPoolExecutor(processes, get_context("spawn"), max_tasks_per_child=1) as pool:
        for speeches in pool.map(_speak_chunk, chunks):
            yield from speeches


def _speak_chunk(utterances: Sequence[Utterance]) -> list[Speech]:
    synthesizer = Synthesizer()
    return [synthesizer.speak(utterance) for utterance in utterances]
