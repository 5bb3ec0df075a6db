"""Training of the detokenizer: conditional flow matching under the attention of streaming.

While speech is streamed, a chunk of noisy frames sees itself, with its look-ahead, and the
finished frames before it, which were computed once at the end of the flow. Training lays both
side by side: every crop appears as finished frames and, chunk by chunk, as noisy ones, and one
attention mask says who sees whom.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimia_infer.models.kimi_audio.dit import DiT, StepConditioning
from kimia_infer.models.kimi_audio.flow import CACHE_TIMESTEP, StreamConfig

TIMESTEPS = 1000  # of the flow, as the network is told (published implementation)


class Chunk(NamedTuple):
    """Codes from ``start`` to ``stop``, seen together with those up to ``seen`` beyond them."""

    start: int
    stop: int
    seen: int


@dataclass(frozen=True)
class Layout:
    """The codes of a training sequence and who sees whom.

    First come the finished codes before the last chunk, then every chunk, noisy, with its
    look-ahead. ``codes`` int64 [length] is the place of each in the crop; ``owner`` int64
    [length] its chunk number, or -1 for finished ones; ``visible`` bool [length, length] (query,
    key).
    """

    codes: Tensor
    owner: Tensor
    visible: Tensor


def chunk_layout(chunks: list[Chunk], past_codes: int) -> Layout:
    """The sequence for ``chunks``, of which each sees at most ``past_codes`` finished codes."""
    finished = torch.arange(chunks[-1].start)
    noisy = [torch.arange(chunk.start, chunk.seen) for chunk in chunks]
    numbers = [torch.full_like(part, index) for index, part in enumerate(noisy)]
    # The chunk that a code belongs to, whether finished or noisy.
    starts = torch.tensor([chunk.start for chunk in chunks])
    chunk_of = torch.cat([torch.bucketize(finished, starts, right=True) - 1, *numbers])
    codes = torch.cat([finished, *noisy])
    owner = torch.cat([torch.full_like(finished, -1), *numbers])
    start = starts[chunk_of][:, None]
    past = (owner < 0) & (codes < start) & (codes >= start - past_codes)
    together = (owner == owner[:, None]) & (chunk_of == chunk_of[:, None])
    return Layout(codes, owner, past | together)


def draw_chunks(
    length: int, shortest: int, longest: int, look_ahead: int, generator: torch.Generator | None
) -> list[Chunk]:
    """A crop of ``length`` codes cut at random; chunks look ahead at random, too."""
    stops = [0]
    while stops[-1] < length:
        stops.append(min(stops[-1] + _between(shortest, longest, generator), length))
    chunks = []
    for start, stop in pairwise(stops):
        ahead = _between(0, look_ahead, generator)
        chunks.append(Chunk(start, stop, min(stop + ahead, length)))
    return chunks


def _between(least: int, most: int, generator: torch.Generator | None) -> int:
    return int(torch.randint(least, most + 1, (), generator=generator))


class FlowMatcher(nn.Module):
    """Velocities of the network for crops laid out for training, as ``stream`` has them."""

    def __init__(self, dit: DiT, stream: StreamConfig | None = None):
        super().__init__()
        self.dit = dit
        self.stream = stream or StreamConfig()

    @property
    def past_codes(self) -> int:
        return self.stream.cache_frames // self.stream.frames_per_code

    def velocities(
        self, frames: Tensor, codes: Tensor, times: Tensor, layout: Layout, lengths: Tensor
    ) -> Tensor:
        """The velocity of every frame of the sequences, [batch, layout frames, mel_bins].

        Args:
            frames: the same shape, normalized; finished ones are clean.
            codes: int64 [batch, layout codes].
            times: integer times of each code, int64 [batch, layout codes].
            lengths: int64 [batch], codes of each crop; those beyond are padding.
        """
        repeat, device = self.stream.frames_per_code, frames.device
        places = layout.codes.to(device)
        positions = (places[:, None] * repeat + torch.arange(repeat, device=device)).flatten()
        valid = places < lengths[:, None]
        # Padding sees padding, since attention to nothing at all is not defined.
        visible = layout.visible.to(device) & (valid[:, None] | ~valid[:, :, None])
        visible = visible.repeat_interleave(repeat, 1).repeat_interleave(repeat, 2)[:, None]

        def attend(query: Tensor, keys: Tensor, values: Tensor, layer: int) -> Tensor:
            return F.scaled_dot_product_attention(query, keys, values, attn_mask=visible)

        blocks, final = self.dit.modulation(codes, times)
        conditioning = StepConditioning(list(blocks), final)
        return self.dit(frames, conditioning, self.dit.rotary(positions), attend)

    def loss(
        self,
        mel: Tensor,
        codes: Tensor,
        lengths: Tensor,
        layout: Layout,
        dropped: Tensor,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Mean squared error of the velocities of all noisy frames, float32 [batch].

        Args:
            mel: normalized crops [batch, frames, mel_bins], padded.
            codes: int64 [batch, codes], padded; ``lengths`` int64 [batch].
            dropped: bool [batch], crops whose codes the network is not told.
            generator: of noise and times.
        """
        batch, repeat, device = len(mel), self.stream.frames_per_code, mel.device
        places, owner = layout.codes.to(device), layout.owner.to(device)
        clean = mel.unflatten(1, (-1, repeat))[:, places]
        count = int(owner.max()) + 1
        drawn = torch.rand(batch, count, generator=generator).to(device)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        is_noisy = owner >= 0
        time = drawn[:, owner.clamp(min=0)]
        mixed = torch.lerp(noise, clean, time[:, :, None, None])
        mixed = torch.where(is_noisy[:, None, None], mixed, clean)
        times = torch.where(is_noisy, (time * TIMESTEPS).long(), CACHE_TIMESTEP)
        tokens = torch.where(dropped[:, None], self.dit.config.codes, codes[:, places])
        found = self.velocities(mixed.flatten(1, 2), tokens, times, layout, lengths).float()
        error = (found.view_as(clean) - (clean - noise)).square().mean(dim=(2, 3))
        counted = (is_noisy & (places < lengths[:, None])).float()
        return (error * counted).sum(1) / counted.sum(1)
