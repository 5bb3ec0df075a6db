"""The flow from noise to mel frames, for chunks of several streams together.

Each chunk has frames before it of its own (:class:`Past`) and its own size and position. Where
operations are launched one by one, the frames of all chunks are packed along the sequence and only
attention is computed chunk by chunk, so that nothing is computed in vain. Where calls are
recorded, chunks are rows padded to a few fixed sizes, all of which are recorded before the first
request.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kimia_infer.models.kimi_audio.dit import DiT, StepConditioning
from kimia_infer.utils.graphs import Graphs, Work

# Time at which finished frames become the past (0.999 of the flow, published implementation).
CACHE_TIMESTEP = 999

RECORDED_ROWS = (1, 2, 4)
"""Chunks of one recorded call. Four full ones are 672 frames, which keep a device busy."""

# Sizes of recorded calls are multiples of these, or the largest possible.
CODES_STEP = 16
KEYS_STEP = 576

CONDITIONED = 1280
"""Codes times timesteps that are conditioned at once: a full chunk at all times, 570 MB."""


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

    @property
    def recorded_frames(self) -> int:
        """The past and the largest chunk, rounded up to what kernels are fastest with."""
        return _round_up(self.cache_frames + self.largest_chunk_frames, 64)


@functools.cache
def ode_timesteps(points: int) -> tuple[int, ...]:
    """Integer times 0 .. 999 of the Euler steps over ``points`` grid points; t = 1 is not used."""
    return tuple((torch.linspace(0, 1, points)[:-1] * 1000).long().tolist())


class Past(NamedTuple):
    """Keys (after rotation) and values of finished frames, each [depth, heads, frames, head_dim].

    Never changed in place, so that it may be kept and shared.
    """

    keys: Tensor
    values: Tensor

    @classmethod
    def nothing(cls, dit: DiT) -> Past:
        """That of a first chunk."""
        shape = (dit.config.depth, dit.config.heads, 0, dit.head_dim)
        empty = torch.empty(shape, device=dit.device, dtype=dit.dtype)
        return cls(empty, empty)

    @property
    def frames(self) -> int:
        return self.keys.shape[2]


class Chunk(NamedTuple):
    """What the flow is followed for.

    The frames of the first ``kept`` codes are wanted, the others are look-ahead. ``noise`` fp32
    [frames, mel_bins] is where the flow begins. With ``continues`` a later chunk needs the past.
    """

    codes: list[int]
    kept: int
    position: int
    past: Past
    noise: Tensor
    continues: bool


class Solution(NamedTuple):
    """Normalized ``frames`` [frames, mel_bins] of a chunk; ``past`` of the chunk after it."""

    frames: Tensor
    past: Past | None


class FrameCache:
    """Attention of frames to those before them and to each other.

    ``keys`` and ``values`` [depth, heads, capacity, head_dim]; the first ``filled`` frames are
    the past. A call of the network writes its own frames behind them, where the next call
    overwrites them.
    """

    def __init__(self, keys: Tensor, values: Tensor, past: Past):
        self.keys, self.values, self.filled = keys, values, past.frames
        keys[:, :, : self.filled], values[:, :, : self.filled] = past

    @classmethod
    def behind(cls, past: Past, frames: int) -> FrameCache:
        """A new one with room for ``frames`` behind the past."""
        depth, heads, filled, head_dim = past.keys.shape
        keys = past.keys.new_empty(depth, heads, filled + frames, head_dim)
        return cls(keys, torch.empty_like(keys), past)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, layer: int) -> Tensor:
        """Attention of frames that follow the past, each [heads, frames, head_dim]."""
        end = self.filled + keys.shape[1]
        self.keys[layer, :, self.filled : end] = keys
        self.values[layer, :, self.filled : end] = values
        return F.scaled_dot_product_attention(
            query[None], self.keys[layer, None, :, :end], self.values[layer, None, :, :end]
        )[0]

    def past(self, frames: int, limit: int) -> Past:
        """A copy of the past and the first ``frames`` behind it; the last ``limit`` of these."""
        end = self.filled + frames
        kept = slice(max(0, end - limit), end)
        return Past(self.keys[:, :, kept].clone(), self.values[:, :, kept].clone())


class FlowNetwork:
    """Follows the flow for one chunk or several, at most ``rows[-1]`` where calls are recorded.

    Keeps nothing of them.
    """

    def __init__(self, dit: DiT, config: StreamConfig, graphs: Graphs, rows: Sequence[int]):
        self.dit, self.config, self.graphs = dit, config, graphs
        times = [*ode_timesteps(config.ode_points), CACHE_TIMESTEP]
        self._times = graphs.upload(torch.tensor(times), dit.device)
        self.calls = RecordedCalls(dit, config, graphs, rows) if graphs.captures else None

    def solve(self, chunks: Sequence[Chunk]) -> list[Solution]:
        """Frames and new past of every chunk."""
        repeat, limit = self.config.frames_per_code, self.config.cache_frames
        rows = Rows(self, chunks) if self.calls is None else PaddedRows(self.calls, chunks)
        rows.begin([chunk.codes for chunk in chunks])
        x = self._follow(rows, rows.pack([chunk.noise for chunk in chunks]))
        found = [
            part[: chunk.kept * repeat] for part, chunk in zip(rows.unpack(x), chunks, strict=True)
        ]
        # The kept frames once more, without the look-ahead, which the next chunk computes.
        again = [c.codes[: c.kept] if c.kept < len(c.codes) else [] for c in chunks]
        if any(again):
            rows.begin(again)
            parts = [part[: len(codes) * repeat] for part, codes in zip(found, again, strict=True)]
            conditioning = self.dit.condition(rows.codes, self._times[-1:])
            rows.velocity(rows.pack(parts), conditioning.at(0))
        return [
            Solution(part, cache.past(len(part), limit) if chunk.continues else None)
            for part, cache, chunk in zip(found, rows.caches, chunks, strict=True)
        ]

    def _follow(self, rows: Rows, x: Tensor) -> Tensor:
        """Euler's method in equal steps from noise x, packed, to normalized frames, likewise."""
        times = self._times[:-1]
        for part in times.split(max(1, CONDITIONED // rows.codes.numel())):
            conditioning = self.dit.condition(rows.codes, part)
            for step in range(len(part)):
                velocity = rows.velocity(x, conditioning.at(step))
                x = torch.add(x, velocity, alpha=1 / len(times))
            del conditioning  # before there is another one
        return x

    def mel(self, solution: Solution | None) -> Tensor:
        """The mel [frames, mel_bins] of a solution; of None, no frames."""
        config = self.dit.config
        if solution is None:
            shape = 0, config.mel_bins
            return torch.empty(shape, device=self.dit.device, dtype=self.dit.dtype)
        return solution.frames * config.mel_std + config.mel_mean

    def read(self, frames: Tensor, codes: Tensor, position: int, past: Past) -> Past:
        """The past that finished, normalized frames [frames, mel_bins] lengthen.

        codes int64 [frames].
        """
        cache = FrameCache.behind(past, len(frames))
        codes = self.graphs.upload(codes, self.dit.device)
        conditioning = self.dit.condition(codes, self._times[-1:]).at(0)
        positions = torch.arange(position, position + len(frames), device=self.dit.device)
        self.dit(frames, conditioning, self.dit.rotary(positions), cache.attend)
        return cache.past(len(frames), self.config.cache_frames)


class Rows:
    """Chunks whose frames are packed along the sequence.

    ``caches`` are theirs, ``codes`` int64 [codes] those of the calls that follow :meth:`begin`.
    """

    codes: Tensor

    def __init__(self, network: FlowNetwork, chunks: Sequence[Chunk]):
        self._dit, self._graphs = network.dit, network.graphs
        self._repeat = network.config.frames_per_code
        self._positions = [chunk.position for chunk in chunks]
        self.caches = [
            FrameCache.behind(chunk.past, len(chunk.codes) * self._repeat) for chunk in chunks
        ]

    def begin(self, codes: Sequence[Sequence[int]]) -> None:
        """The next calls are of these codes of each chunk, of which there may be none."""
        self._frames = [len(part) * self._repeat for part in codes]
        self.codes = self._upload(torch.tensor([code for part in codes for code in part]))
        spans = zip(self._positions, self._frames, strict=True)
        places = torch.cat([torch.arange(start, start + frames) for start, frames in spans])
        self._rotary = self._dit.rotary(self._upload(places))

    def pack(self, parts: Sequence[Tensor]) -> Tensor:
        """Frames [frames, mel_bins] of every chunk as :meth:`velocity` takes them."""
        return self._upload(torch.cat([part.to(self._dit.dtype) for part in parts]))

    def unpack(self, x: Tensor) -> Sequence[Tensor]:
        """The inverse of :meth:`pack`."""
        return x.split(self._frames)

    def velocity(self, x: Tensor, conditioning: StepConditioning) -> Tensor:
        """The velocity of all frames x, packed; valid until the next call."""
        return self._dit(x, conditioning, self._rotary, self._attend)

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, layer: int) -> Tensor:
        parts = zip(
            self.caches,
            query.split(self._frames, 1),
            keys.split(self._frames, 1),
            values.split(self._frames, 1),
            strict=True,
        )
        return torch.cat([cache.attend(q, k, v, layer) for cache, q, k, v in parts if k.numel()], 1)

    def _upload(self, values: Tensor) -> Tensor:
        return self._graphs.upload(values, self._dit.device)


class CallSize(NamedTuple):
    """What a call is padded to: chunks, codes of each, and keys that are seen."""

    rows: int
    codes: int
    keys: int


class RecordedCalls:
    """Calls of the network on fixed tensors, recorded once for each size and shared by all.

    ``keys`` and ``values`` [depth, rows, heads, capacity, head_dim]; the other tensors are as
    large as the largest call.
    """

    @torch.inference_mode(False)  # so that later calls can write in any mode
    def __init__(self, dit: DiT, config: StreamConfig, graphs: Graphs, rows: Sequence[int]):
        self.dit, self.config, self.graphs, self.rows = dit, config, graphs, rows
        sizes, place = dit.config, {"device": dit.device, "dtype": dit.dtype}
        most, codes, frames = rows[-1], config.largest_chunk_codes, config.largest_chunk_frames
        capacity = config.recorded_frames
        self.keys = torch.zeros(sizes.depth, most, sizes.heads, capacity, sizes.head_dim, **place)
        self.values = torch.zeros_like(self.keys)
        self.x = torch.zeros(most, frames, sizes.mel_bins, **place)
        self.velocity = torch.zeros_like(self.x)
        self.blocks = torch.zeros(sizes.depth, most, codes, 6, sizes.hidden_size, **place)
        self.final = torch.zeros(most, codes, 2, sizes.hidden_size, **place)
        self.rotary = torch.zeros(most, 1, frames, sizes.head_dim // 2, 2, device=dit.device)
        self.filled = torch.zeros(most, 1, dtype=torch.int64, device=dit.device)
        self.frames = torch.zeros_like(self.filled)
        self._recorded: dict[CallSize, Work] = {}
        self._codes = sorted({*range(CODES_STEP, codes, CODES_STEP), codes})
        self._keys = sorted({*range(KEYS_STEP, capacity, KEYS_STEP), capacity})

    def size(self, rows: int, codes: int, keys: int) -> CallSize:
        """The smallest size that holds so many."""
        known = (self.rows, rows), (self._codes, codes), (self._keys, keys)
        return CallSize(*(min(s for s in sizes if s >= least) for sizes, least in known))

    def record_all(self) -> None:
        """Record every size, so that nothing is recorded later."""
        for size in product(self.rows, self._codes, self._keys):
            self._record(CallSize(*size))

    def launch(self, size: CallSize) -> None:
        """Compute ``velocity`` from the other tensors."""
        self._record(size)()

    def _record(self, size: CallSize) -> Work:
        if size not in self._recorded:
            self._recorded[size] = self.graphs.record(lambda: self._call(size))
        return self._recorded[size]

    def _call(self, size: CallSize) -> None:
        """Frames beyond those of a row are computed too, but nothing sees them."""
        count, codes, bucket = size
        frames, device = codes * self.config.frames_per_code, self.dit.device
        filled, end = self.filled[:count], (self.filled + self.frames)[:count]
        places = (filled + torch.arange(frames, device=device))[:, None, :, None]
        places = places.expand(-1, self.keys.shape[2], -1, self.keys.shape[4])
        # A row without frames sees one, since attention to nothing at all is not defined.
        hidden = torch.arange(bucket, device=device) >= end.clamp(min=1)
        mask = torch.zeros(hidden.shape, device=device, dtype=self.dit.dtype)
        mask = mask.masked_fill(hidden, -torch.inf)[:, None, None].expand(-1, 1, frames, -1)

        def attend(query: Tensor, keys: Tensor, values: Tensor, layer: int) -> Tensor:
            self.keys[layer, :count].scatter_(2, places, keys)
            self.values[layer, :count].scatter_(2, places, values)
            seen = (kept[layer, :count, :, :bucket] for kept in (self.keys, self.values))
            return F.scaled_dot_product_attention(query, *seen, attn_mask=mask)

        conditioning = StepConditioning(self.blocks[:, :count, :codes], self.final[:count, :codes])
        x, rotary = self.x[:count, :frames], self.rotary[:count, :, :frames]
        self.velocity[:count, :frames] = self.dit(x, conditioning, rotary, attend)


class PaddedRows(Rows):
    """Chunks as the rows of recorded calls; ``codes`` int64 [rows, codes] and frames are padded."""

    def __init__(self, calls: RecordedCalls, chunks: Sequence[Chunk]):
        self._calls, self._dit, self._graphs = calls, calls.dit, calls.graphs
        self._repeat = calls.config.frames_per_code
        self._positions = [chunk.position for chunk in chunks]
        self.caches = []
        for row, chunk in enumerate(chunks):
            keys, values = calls.keys[:, row], calls.values[:, row]
            for tensor in (keys, values):  # what is masked must be finite, whatever was there
                tensor[:, :, chunk.past.frames :].zero_()
            self.caches.append(FrameCache(keys, values, chunk.past))

    def begin(self, codes: Sequence[Sequence[int]]) -> None:
        calls, filled = self._calls, [cache.filled for cache in self.caches]
        self._frames = [len(part) * self._repeat for part in codes]
        keys = max(map(sum, zip(filled, self._frames, strict=True)))
        size = self._size = calls.size(len(codes), max(map(len, codes)), keys)
        rows = zip(self._positions, filled, self._frames, codes, strict=True)
        given = torch.zeros(size.rows, 3 + size.codes, dtype=torch.int64)
        for row, (position, past, frames, part) in enumerate(rows):
            given[row, : 3 + len(part)] = torch.tensor([position, past, frames, *part])
        given = self._upload(given)
        places = given[:, :1] + torch.arange(size.codes * self._repeat, device=given.device)
        calls.rotary[: size.rows, :, : places.shape[1]] = self._dit.rotary(places)[:, None]
        calls.filled[: size.rows], calls.frames[: size.rows] = given[:, 1:2], given[:, 2:3]
        self.codes = given[:, 3:]

    def pack(self, parts: Sequence[Tensor]) -> Tensor:
        x = pad_sequence([part.to(self._dit.dtype) for part in parts], batch_first=True)
        frames = self._size.codes * self._repeat - x.shape[1]
        return self._upload(F.pad(x, (0, 0, 0, frames, 0, self._size.rows - len(x))))

    def unpack(self, x: Tensor) -> Sequence[Tensor]:
        return [row[:frames] for row, frames in zip(x, self._frames, strict=False)]

    def velocity(self, x: Tensor, conditioning: StepConditioning) -> Tensor:
        calls, (rows, codes, _) = self._calls, self._size
        assert isinstance(conditioning.blocks, Tensor)
        calls.x[:rows, : x.shape[1]] = x
        calls.blocks[:, :rows, :codes] = conditioning.blocks
        calls.final[:rows, :codes] = conditioning.final
        calls.launch(self._size)
        return calls.velocity[:rows, : x.shape[1]]


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
