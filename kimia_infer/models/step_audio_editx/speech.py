"""Audio tokens to a wave, in one piece or in chunks while they are generated."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kimia_infer.audio.files import Check
from kimia_infer.layers.sampler import SeededRandomness
from kimia_infer.models.step_audio_editx.checkpoint import Networks
from kimia_infer.models.step_audio_editx.flow import MelStream
from kimia_infer.models.step_audio_editx.hift import WaveStream
from kimia_infer.models.step_audio_editx.packing import GROUP, flow_rows, whole_groups
from kimia_infer.models.step_audio_editx.reference import Reference, Timed

FLOW_NOISE, VOICE_NOISE = 0, 1
"""Addresses of random numbers."""

CHUNK_GROUPS = 9, 8, 16
"""Of the first chunks, and of all further ones. The first has 1 of look-ahead and 3.7 of what the
vocoder waits for, so that it gives 0.5 s of sound, for which the next may be generated; 0.96 s
and then 1.92 s are the published sizes."""


class Speech:
    """The speech of one answer, float32 [samples] on the CPU."""

    def __init__(
        self,
        networks: Networks,
        reference: Reference,
        randomness: SeededRandomness,
        check: Check,
        timed: Timed,
    ):
        self._device, self._timed = networks.language_model.device, timed

        def noise(address: int, channels: int) -> Callable[[int], Tensor]:
            draws = randomness.noise_stream(address, channels)
            return lambda count: draws(count).to(self._device)

        vocoder = networks.vocoder
        voice = reference.rows, reference.mel, reference.speaker
        draws = noise(FLOW_NOISE, networks.flow.config.mel_bins)
        self._mel = MelStream(networks.flow, *voice, draws, check)
        draws = noise(VOICE_NOISE, vocoder.config.harmonics)
        self._wave = WaveStream(vocoder, draws, check)

    @torch.inference_mode()
    def push(self, tokens: list[int], last: bool) -> Tensor:
        """The wave behind that of the calls before, as far as the next audio tokens decide it.

        Raises RequestError if ``tokens``, those of whole groups, are none.
        """
        rows = flow_rows(tokens).to(self._device)
        with self._timed("flow"):
            mel = self._mel.push(rows, last)
        with self._timed("vocoder"):
            return self._wave.push(mel, last).cpu()


def in_one_piece(tokens: Iterator[int]) -> Iterator[tuple[list[int], bool]]:
    """All tokens of whole groups, as the last chunk."""
    yield whole_groups(list(tokens)), True


def in_chunks(tokens: Iterator[int]) -> Iterator[tuple[list[int], bool]]:
    """Chunks of CHUNK_GROUPS as soon as they are there, and whether one is the last."""
    waiting: list[int] = []
    sizes = iter(CHUNK_GROUPS)
    size = GROUP * next(sizes)
    for token in tokens:
        if len(waiting) == size:  # there is more, so this is not the last
            yield waiting, False
            waiting, size = [], GROUP * next(sizes, CHUNK_GROUPS[-1])
        waiting.append(token)
    yield whole_groups(waiting), True
