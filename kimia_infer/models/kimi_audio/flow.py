"""Codes to mel, chunk by chunk: an ODE from noise to mel frames, with a look-ahead.

The last codes of a chunk are only a look-ahead: their frames are computed, so that the frames
before them know what follows, but thrown away and computed again with the next chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kimia_infer.models.kimi_audio.dit import Conditioning
from kimia_infer.models.kimi_audio.flow_evaluation import Evaluator, FrameCache

Noise = Callable[[int, int], Tensor]

# Time at which finished frames enter the cache (0.999 of the flow, published implementation).
CACHE_TIMESTEP = 999


@dataclass(frozen=True)
class StreamConfig:
    """How speech is cut into chunks; defaults from the published implementation.

    A frame is one mel frame (1/50 s), a code spans ``frames_per_code`` of them. ``chunk_codes``
    is the most a chunk takes in, besides the look-ahead left over from the one before.
    ``cache_frames`` is how much past the network sees; positions restart when the next chunk
    could pass ``position_limit``. ``ode_points`` grid points make one Euler step fewer. A reference
    voice is read in at most ``voice_chunks`` chunks of ``voice_chunk_frames``, after the rest.
    """

    chunk_codes: int = 30
    look_ahead_codes: int = 12
    frames_per_code: int = 4
    cache_frames: int = 900
    position_limit: int = 4096
    ode_points: int = 30
    voice_chunk_frames: int = 120
    voice_chunks: int = 10

    @property
    def largest_chunk_codes(self) -> int:
        return self.chunk_codes + self.look_ahead_codes

    @property
    def largest_chunk_frames(self) -> int:
        return self.largest_chunk_codes * self.frames_per_code


def ode_timesteps(points: int) -> list[int]:
    """Integer times 0 .. 999 of the Euler steps over ``points`` grid points; t = 1 is not used."""
    return (torch.linspace(0, 1, points)[:-1] * 1000).long().tolist()


def euler(
    evaluator: Evaluator, x: Tensor, conditioning: Conditioning, rotary: Tensor, steps: int
) -> Tensor:
    """Follow the flow from noise x [frames, mel_bins] to a normalized mel in equal steps.

    Step k uses entry k of ``conditioning``.
    """
    for step in range(steps):
        velocity = evaluator.velocity(x, conditioning.at(step), rotary)
        x = torch.add(x, velocity, alpha=1 / steps)
    return x


class MelStream:
    """The mel side of one stream.

    ``noise(chunk, frames)`` gives the start of chunk number ``chunk``, fp32 [frames, mel_bins].
    State: ``pending`` codes (the look-ahead), the ``cache`` of past frames, the ``position`` of
    the next frame and the number of ``chunks`` made.
    """

    def __init__(self, evaluator: Evaluator, noise: Noise, config: StreamConfig):
        self.evaluator, self.noise, self.config = evaluator, noise, config
        self.dit, self.cache = evaluator.dit, evaluator.cache
        self.cache.filled = 0
        self.pending = torch.empty(0, dtype=torch.int64)
        self.position = 0
        self.chunks = 0
        self._voice: tuple[int, tuple[Tensor, Tensor]] | None = None

    def push(self, codes: Tensor, final: bool) -> Tensor:
        """Mel [frames, mel_bins] of all codes int64 [n] so far, less the look-ahead unless final.

        Codes that do not reach beyond the look-ahead wait and give no frames.
        """
        codes = torch.cat([self.pending, codes.cpu()])
        kept = len(codes) if final else max(0, len(codes) - self.config.look_ahead_codes)
        self.pending = codes[kept:]
        if kept:
            mel = self._chunk(codes, kept, final)
            self.chunks += 1
        else:
            bins, place = self.dit.config.mel_bins, self.dit.device
            mel = torch.empty(0, bins, device=place, dtype=self.dit.dtype)
        self.position += len(mel)
        if final:
            self._voice = None
        if final or self.position + 2 * len(mel) > self.config.position_limit:
            self._restart()
        return mel

    def _chunk(self, codes: Tensor, kept: int, final: bool) -> Tensor:
        repeat = self.config.frames_per_code
        frames = len(codes) * repeat
        timesteps = ode_timesteps(self.config.ode_points)
        refresh = kept < len(codes)
        conditioning = self.dit.condition(
            codes, [*timesteps, CACHE_TIMESTEP] if refresh else timesteps
        )
        rotary = self.dit.rotary(self.position, frames)
        x = euler(self.evaluator, self._start(frames), conditioning, rotary, len(timesteps))
        x = x[: kept * repeat]
        if refresh:
            # The kept frames once more, without the look-ahead, which the next chunk makes anew.
            self.evaluator.velocity(x, conditioning.at(-1, kept), rotary[: len(x)])
        if not final:
            self.cache.keep(len(x), self.config.cache_frames)
        return x * self.dit.config.mel_std + self.dit.config.mel_mean

    def _start(self, frames: int) -> Tensor:
        noise = self.noise(self.chunks, frames)
        expected = (frames, self.dit.config.mel_bins)
        if noise.shape != expected:
            raise ValueError(
                f"noise of chunk {self.chunks} has shape {list(noise.shape)}, "
                f"expected {list(expected)}"
            )
        return noise.to(self.dit.device, self.dit.dtype)

    def _restart(self) -> None:
        """Positions from the beginning: behind the reference voice if there is one, else 0."""
        self.position, self.cache.filled = 0, 0
        if self._voice is not None:
            self.position, past = self._voice
            self.cache.restore(past)

    def prefill(self, mel: Tensor, tokens: Tensor) -> None:
        """Continue in the voice of mel [frames, mel_bins], whose codes are int64 [tokens].

        ``tokens`` has one code per mel frame; as published, the mel is cut or padded with zeros
        to its length, and the frames that do not fill whole chunks come first, in one piece.
        """
        config, dit = self.config, self.dit
        mel = mel[: len(tokens)]
        mel = F.pad(mel, (0, 0, 0, len(tokens) - len(mel)))
        x = ((mel - dit.config.mel_mean) / dit.config.mel_std).to(dit.device, dit.dtype)
        chunks = min(len(tokens) // config.voice_chunk_frames, config.voice_chunks)
        rest = len(tokens) - chunks * config.voice_chunk_frames
        sizes = [rest] * (rest > 0) + [config.voice_chunk_frames] * chunks
        # Of its own, as pieces may be larger than chunks of speech.
        cache = FrameCache(dit, config.cache_frames + max(sizes))
        for part, codes in zip(x.split(sizes), tokens.split(sizes), strict=True):
            conditioning = dit.condition(codes, [CACHE_TIMESTEP])
            dit(part, conditioning.at(0), dit.rotary(self.position, len(part)), cache.attend)
            cache.keep(len(part), config.cache_frames)
            self.position += len(part)
        self._voice = (self.position, cache.past())
        self.cache.restore(cache.past())
