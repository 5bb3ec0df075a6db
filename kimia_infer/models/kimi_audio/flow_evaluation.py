"""One evaluation of the velocity network: operation by operation, or as a recorded graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kimia_infer.models.kimi_audio.dit import DiT, StepConditioning
from kimia_infer.utils.graphs import Graphs

# Sizes are rounded up to multiples of these, so that few graphs serve all chunks.
CODES_STEP = 8
EXTENT_STEP = 256


class FrameCache:
    """Keys (after rotation) and values of the frames before the current chunk.

    ``keys`` and ``values`` [depth, heads, capacity, head_dim]; the first ``filled`` frames are
    the past. An evaluation writes its own frames behind them, where the next evaluation
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
        """Make the first ``frames`` of the last evaluation past; forget all but ``limit``."""
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


class Evaluator:
    """Evaluates the network for one stream at a time, on top of that stream's ``cache``.

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
        """What the network gives for a chunk; valid until the next evaluation."""
        if not self.graphs.captures:
            return self.dit(x, conditioning, rotary, self.cache.attend)
        codes = min(_round_up(conditioning.final.shape[0], CODES_STEP), self.chunk_codes)
        end = self.cache.filled + codes * self.frames_per_code
        key = codes, min(_round_up(end, EXTENT_STEP), self.cache.capacity)
        self._inputs.put(x, conditioning, rotary, self.cache.filled)
        if key not in self._recorded:
            self._recorded[key] = self.graphs.record(lambda: self._evaluate(*key))
        self._recorded[key]()
        return self._inputs.velocity[: len(x)]

    def _evaluate(self, codes: int, extent: int) -> None:
        """Frames beyond those of the chunk are computed too, but nothing sees them."""
        inputs, cache, frames = self._inputs, self.cache, codes * self.frames_per_code
        places = inputs.filled + torch.arange(frames, device=self.dit.device)
        seen = torch.arange(extent, device=self.dit.device) < inputs.filled + inputs.frames
        mask = seen.expand(1, 1, frames, extent)

        def attend(query: Tensor, keys: Tensor, values: Tensor, layer: int) -> Tensor:
            cache.keys[layer].index_copy_(1, places, keys)
            cache.values[layer].index_copy_(1, places, values)
            filled = cache.keys[layer, None, :, :extent], cache.values[layer, None, :, :extent]
            return F.scaled_dot_product_attention(query[None], *filled, attn_mask=mask)[0]

        conditioning = StepConditioning(inputs.blocks[:, :codes], inputs.final[:codes])
        velocity = self.dit(inputs.x[:frames], conditioning, inputs.rotary[:frames], attend)
        inputs.velocity[:frames] = velocity


class _Inputs:
    """Tensors that recorded evaluations read and write; as large as the largest chunk."""

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
