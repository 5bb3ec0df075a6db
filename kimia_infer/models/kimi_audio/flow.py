"""Codes to mel, chunk by chunk: an ODE from noise to mel frames, with a look-ahead.

The last codes of a chunk are only a look-ahead: their frames are computed, so that the frames
before them know what follows, but thrown away and computed again with the next chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kimia_infer.models.kimi_audio.dit import Conditioning, DiT, StepConditioning
from kimia_infer.utils.graphs import Graphs

Noise = Callable[[int, int], Tensor]

# Time at which finished frames enter the cache (0.999 of the flow, published implementation).
CACHE_TIMESTEP = 999

# Sizes are rounded up to multiples of these, so that few graphs serve all chunks.
CODES_STEP = 8
BUCKET_STEP = 256


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


@functools.cache
def ode_timesteps(points: int) -> tuple[int, ...]:
    """Integer times 0 .. 999 of the Euler steps over ``points`` grid points; t = 1 is not used."""
    return tuple((torch.linspace(0, 1, points)[:-1] * 1000).long().tolist())


class FrameCache:
    """Keys (after rotation) and values of the frames before the current chunk.

    ``keys`` and ``values`` [depth, heads, capacity, head_dim]; the first ``filled`` frames are
    the past. A call of the network writes its own frames behind them, where the next call
    overwrites them, until :meth:`keep` makes them part of the past.
    """

    def __init__(self, dit: DiT, capacity: int):
        config = dit.config
        shape = (config.depth, config.heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, device=dit.device, dtype=dit.dtype)
        self.values = torch.zeros_like(self.keys)
        self.filled = 0

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, layer: int) -> Tensor:
        """Attention of frames that follow the past, each [heads, frames, head_dim]."""
        end = self.filled + keys.shape[1]
        self.keys[layer, :, self.filled : end] = keys
        self.values[layer, :, self.filled : end] = values
        return F.scaled_dot_product_attention(
            query[None], self.keys[layer, None, :, :end], self.values[layer, None, :, :end]
        )[0]

    def keep(self, frames: int, limit: int) -> None:
        """Keep the first ``frames`` of the last call as past; ``limit`` frames in all at most."""
        end = self.filled + frames
        self.filled = min(end, limit)
        if end > limit:
            # Source and target overlap, hence the copy.
            self.keys[:, :, :limit] = self.keys[:, :, end - limit : end].clone()
            self.values[:, :, :limit] = self.values[:, :, end - limit : end].clone()

    def past(self) -> tuple[Tensor, Tensor]:
        """A copy of the past, each [depth, heads, filled, head_dim]."""
        return self.keys[:, :, : self.filled].clone(), self.values[:, :, : self.filled].clone()

    def restore(self, past: tuple[Tensor, Tensor]) -> None:
        """Go back to what :meth:`past` returned."""
        self.filled = past[0].shape[2]
        self.keys[:, :, : self.filled], self.values[:, :, : self.filled] = past


class FlowNetwork:
    """Calls the network for one stream at a time, on top of that stream's ``cache``.

    A call is launched operation by operation, or recorded once for each size and replayed.

    ``past_frames`` and ``chunk_codes`` are the most that the cache keeps and that a chunk has,
    ``frames_per_code`` what a code spans.
    """

    @torch.inference_mode(False)  # so that later streams can write in any mode
    def __init__(
        self, dit: DiT, past_frames: int, chunk_codes: int, frames_per_code: int, graphs: Graphs
    ):
        self.dit, self.graphs = dit, graphs
        self.chunk_codes, self.frames_per_code = chunk_codes, frames_per_code
        frames = chunk_codes * frames_per_code
        self.cache = FrameCache(dit, past_frames + frames)
        if graphs.captures:
            self._inputs = _Inputs(dit, chunk_codes, frames)
            self._recorded: dict[tuple[int, int], Callable[[], None]] = {}

    def velocity(self, x: Tensor, conditioning: StepConditioning, rotary: Tensor) -> Tensor:
        """Velocity [frames, mel_bins] of a chunk x; valid until the next call."""
        if not self.graphs.captures:
            return self.dit(x, conditioning, rotary, self.cache.attend)
        codes = min(_round_up(conditioning.final.shape[0], CODES_STEP), self.chunk_codes)
        end = self.cache.filled + codes * self.frames_per_code
        key = codes, min(_round_up(end, BUCKET_STEP), self.cache.capacity)
        self._inputs.put(x, conditioning, rotary, self.cache.filled)
        if key not in self._recorded:
            self._recorded[key] = self.graphs.record(lambda: self._call(*key))
        self._recorded[key]()
        return self._inputs.velocity[: len(x)]

    def _call(self, codes: int, bucket: int) -> None:
        """Frames beyond those of the chunk are computed too, but nothing sees them."""
        inputs, cache, frames = self._inputs, self.cache, codes * self.frames_per_code
        places = inputs.filled + torch.arange(frames, device=self.dit.device)
        seen = torch.arange(bucket, device=self.dit.device) < inputs.filled + inputs.frames
        mask = seen.expand(1, 1, frames, bucket)

        def attend(query: Tensor, keys: Tensor, values: Tensor, layer: int) -> Tensor:
            cache.keys[layer].index_copy_(1, places, keys)
            cache.values[layer].index_copy_(1, places, values)
            filled = cache.keys[layer, None, :, :bucket], cache.values[layer, None, :, :bucket]
            return F.scaled_dot_product_attention(query[None], *filled, attn_mask=mask)[0]

        conditioning = StepConditioning(inputs.blocks[:, :codes], inputs.final[:codes])
        velocity = self.dit(inputs.x[:frames], conditioning, inputs.rotary[:frames], attend)
        inputs.velocity[:frames] = velocity


class _Inputs:
    """Tensors that recorded calls read and write; as large as the largest chunk."""

    def __init__(self, dit: DiT, codes: int, frames: int):
        config, place = dit.config, {"device": dit.device, "dtype": dit.dtype}
        self.x = torch.zeros(frames, config.mel_bins, **place)
        self.velocity = torch.zeros_like(self.x)
        self.blocks = torch.zeros(config.depth, codes, 6, config.hidden_size, **place)
        self.final = torch.zeros(codes, 2, config.hidden_size, **place)
        self.rotary = torch.zeros(frames, config.head_dim // 2, 2, device=dit.device)
        self.filled = torch.zeros(1, dtype=torch.int64, device=dit.device)
        self.frames = torch.zeros_like(self.filled)

    def put(self, x: Tensor, conditioning: StepConditioning, rotary: Tensor, filled: int) -> None:
        frames, codes = len(x), len(conditioning.final)
        self.x[:frames] = x
        self.blocks[:, :codes] = conditioning.blocks
        self.final[:codes] = conditioning.final
        self.rotary[:frames] = rotary
        self.filled.fill_(filled)
        self.frames.fill_(frames)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def euler(
    network: FlowNetwork, x: Tensor, conditioning: Conditioning, rotary: Tensor, steps: int
) -> Tensor:
    """Follow the flow from noise x [frames, mel_bins] to a normalized mel in equal steps.

    Step k uses entry k of ``conditioning``.
    """
    for step in range(steps):
        velocity = network.velocity(x, conditioning.at(step), rotary)
        x = torch.add(x, velocity, alpha=1 / steps)
    return x


class MelStream:
    """The mel side of one stream.

    ``noise(chunk, frames)`` gives the start of chunk number ``chunk``, fp32 [frames, mel_bins].
    State: ``pending`` codes (the look-ahead), the ``cache`` of past frames, the ``position`` of
    the next frame and the number of ``chunks`` made.
    """

    def __init__(self, network: FlowNetwork, noise: Noise, config: StreamConfig):
        self.network, self.noise, self.config = network, noise, config
        self.dit, self.cache = network.dit, network.cache
        self.cache.filled = 0
        self.pending: list[int] = []
        self.position = 0
        self.chunks = 0
        self._voice: tuple[int, tuple[Tensor, Tensor]] | None = None

    def push(self, codes: Sequence[int], final: bool) -> Tensor:
        """Mel [frames, mel_bins] of all codes so far, less the look-ahead unless ``final``.

        Codes that do not reach beyond the look-ahead wait and give no frames.
        """
        codes = [*self.pending, *codes]
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

    def _chunk(self, codes: list[int], kept: int, final: bool) -> Tensor:
        repeat = self.config.frames_per_code
        frames = len(codes) * repeat
        timesteps = ode_timesteps(self.config.ode_points)
        refresh = kept < len(codes)
        times = (*timesteps, CACHE_TIMESTEP) if refresh else timesteps
        conditioning = self.dit.condition(torch.tensor(codes), times)
        rotary = self.dit.rotary(self.position, frames)
        x = euler(self.network, self._start(frames), conditioning, rotary, len(timesteps))
        x = x[: kept * repeat]
        if refresh:
            # The kept frames once more, without the look-ahead, which the next chunk makes anew.
            self.network.velocity(x, conditioning.at(-1, kept), rotary[: len(x)])
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
        # A separate cache, as pieces may be larger than chunks of speech.
        cache = FrameCache(dit, config.cache_frames + max(sizes))
        for part, codes in zip(x.split(sizes), tokens.split(sizes), strict=True):
            conditioning = dit.condition(codes, [CACHE_TIMESTEP])
            dit(part, conditioning.at(0), dit.rotary(self.position, len(part)), cache.attend)
            cache.keep(len(part), config.cache_frames)
            self.position += len(part)
        self._voice = (self.position, cache.past())
        self.cache.restore(cache.past())
