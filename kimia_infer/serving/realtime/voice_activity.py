"""When somebody speaks, by silero-vad."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import soxr
import torch

from kimia_infer.audio.silero import load_silero
from kimia_infer.serving.realtime.config import ServerVad
from kimia_infer.serving.realtime.schema import SAMPLE_RATE, samples_in

RATE = 16_000
WINDOW = 512
"""Samples that the model hears at a time, 32 ms."""

HYSTERESIS, LOWEST = 0.15, 0.01
"""Speech ends below the threshold by so much, but not below the second (silero-vad's own rule)."""


@dataclass(frozen=True)
class Change:
    """Speech began, or was found to have ended, at a sample counted from the stream's first."""

    speaking: bool
    sample: int


class VoiceActivity:
    """The detector, loaded once. Its streams share one thread, beside those of answers."""

    def __init__(self) -> None:
        self._model, threads = load_silero(), torch.get_num_threads()
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="voice-activity")
        torch.set_num_threads(1)
        self.pool.submit(self._warm_up).result()  # begins, and stays, with one thread
        torch.set_num_threads(threads)

    def _warm_up(self) -> None:
        """The first windows are slow."""
        stream = Stream(copy.deepcopy(self._model))
        list(stream.changes(np.zeros(SAMPLE_RATE, np.int16), ServerVad()))

    async def stream(self) -> Stream:
        """A stream with a state of its own."""
        loop = asyncio.get_running_loop()
        return Stream(await loop.run_in_executor(self.pool, copy.deepcopy, self._model))

    async def listen(self, stream: Stream, sound: bytes, settings: ServerVad) -> list[Change]:
        """What changes in the next piece of a stream (int16 samples at 24 kHz)."""

        def run() -> list[Change]:
            return list(stream.changes(np.frombuffer(sound, "<i2"), settings))

        return await asyncio.get_running_loop().run_in_executor(self.pool, run)

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)


class Stream:
    """One speaker's sound, piece by piece. ``speaking`` says how it was last."""

    def __init__(self, model: Any):
        self._model = model
        self.received = 0
        self.reset()

    def reset(self) -> None:
        """Forget the sound before the next sample."""
        self._model.reset_states()
        self._resampler = soxr.ResampleStream(SAMPLE_RATE, RATE, 1, dtype="float32")
        self._rest = np.empty(0, np.float32)
        self._begin, self._heard = self.received, 0
        self._quiet_since: int | None = None
        self.speaking = False

    def changes(self, sound: np.ndarray, settings: ServerVad) -> Iterator[Change]:
        """Listen to samples int16 [n] at 24 kHz."""
        self.received += len(sound)
        wave = self._resampler.resample_chunk(sound.astype(np.float32) / 32_768)
        wave = np.concatenate([self._rest, wave])
        whole = len(wave) // WINDOW * WINDOW
        self._rest = wave[whole:]
        for window in wave[:whole].reshape(-1, WINDOW):
            change = self._next(window, settings)
            if change is not None:
                yield change

    @torch.inference_mode()
    def _next(self, window: np.ndarray, settings: ServerVad) -> Change | None:
        probability = self._model(torch.from_numpy(window), RATE).item()
        begin, self._heard = self._heard, self._heard + WINDOW
        if probability >= settings.threshold:
            self._quiet_since = None
            if not self.speaking:
                self.speaking = True
                return Change(True, self._position(begin))
        elif self.speaking and probability < max(settings.threshold - HYSTERESIS, LOWEST):
            if self._quiet_since is None:
                self._quiet_since = begin
            quiet = self._heard - self._quiet_since
            if quiet * SAMPLE_RATE >= samples_in(settings.silence_duration_ms) * RATE:
                self.speaking = False
                self._quiet_since = None
                return Change(False, self._position(self._heard))
        return None

    def _position(self, heard: int) -> int:
        """Where in the stream a sample at 16 kHz is."""
        return self._begin + heard * SAMPLE_RATE // RATE
