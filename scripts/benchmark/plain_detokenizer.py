"""The published algorithm from codes to a waveform: the baseline of the speed comparison.

Same results and parameters as the library's Detokenizer, with the operations of the published
implementation: adaLN modulation of every frame in every network call, keys and values of the past
concatenated in every call, and the vocoder's rate changes as grouped convolutions between explicit
paddings. Weight norm is folded in both.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimia_infer.models.kimi_audio.detokenizer import Detokenizer, Noise
from kimia_infer.models.kimi_audio.dit import DiT, StepConditioning
from kimia_infer.models.kimi_audio.flow import CACHE_TIMESTEP, StreamConfig
from kimia_infer.models.kimi_audio.vocoder import (
    AntiAliasedSnake,
    SnakeBeta,
    Vocoder,
    WaveOverlap,
    low_pass_filter,
)

KeysAndValues = tuple[Tensor, Tensor]
Network = TypeVar("Network", DiT, Vocoder)


class PlainDetokenizer:
    """Shares the parameters of ``detokenizer``, but not the layers that may have replaced some."""

    def __init__(self, detokenizer: Detokenizer):
        self.config, self.dit = detokenizer.config, _rebuilt(detokenizer.dit)
        self.vocoder = _rebuilt(detokenizer.vocoder)
        for parent in list(self.vocoder.modules()):
            for name, layer in parent.named_children():
                if isinstance(layer, AntiAliasedSnake):
                    setattr(parent, name, PlainActivation(layer.act))

    def synthesize(self, codes: Tensor, noise: Noise) -> Tensor:
        """The wave fp32 [1, samples] of the codes int64 [n], as ``Detokenizer.synthesize``.

        Only for utterances that end before the position limit of the stream.
        """
        mel_stream, overlap = MelStream(self.dit, noise, self.config), WaveOverlap(self.vocoder)
        chunks = codes.split(self.config.chunk_codes)
        waves = []
        with torch.no_grad():
            for index, chunk in enumerate(chunks, 1):
                final = index == len(chunks)
                mel = overlap.joined(mel_stream.push(chunk, final), final)
                assert mel is not None
                waves.append(overlap.release(mel, self.vocoder(mel), final).float())
        return torch.cat(waves)[None]


def _rebuilt(network: Network) -> Network:
    with torch.device("meta"):
        plain = type(network)(network.config)
    plain.load_state_dict(network.state_dict(), assign=True)
    return plain.eval()


class MelStream:
    """Chunks of codes to mel; ``past`` holds keys and values [heads, frames, head_dim] by layer."""

    def __init__(self, dit: DiT, noise: Noise, config: StreamConfig):
        self.dit, self.noise, self.config = dit, noise, config
        self.past: list[KeysAndValues] = []
        self.pending = torch.empty(0, dtype=torch.int64)
        self.position = 0
        self.chunks = 0

    def push(self, codes: Tensor, final: bool) -> Tensor:
        """Mel [frames, mel_bins] of all codes int64 [n] so far, less the look-ahead unless final.

        Unless final, there must be more codes than the look-ahead.
        """
        config = self.config
        codes = torch.cat([self.pending, codes])
        kept = len(codes) if final else len(codes) - config.look_ahead_codes
        self.pending = codes[kept:]
        tokens = codes.repeat_interleave(config.frames_per_code).to(self.dit.device)
        x = self.noise(self.chunks, len(tokens)).to(self.dit.device, self.dit.dtype)
        current: list[KeysAndValues] = []
        for start, end in pairwise(torch.linspace(0, 1, config.ode_points).tolist()):
            velocity, current = self._evaluate(x, tokens, int(1000 * start))
            x = x + (end - start) * velocity
        x = x[: kept * config.frames_per_code]
        if kept < len(codes):
            _, current = self._evaluate(x, tokens[: len(x)], CACHE_TIMESTEP)
        frames = config.cache_frames
        self.past = [(keys[:, -frames:], values[:, -frames:]) for keys, values in current]
        self.position += len(x)
        self.chunks += 1
        return x * self.dit.config.mel_std + self.dit.config.mel_mean

    def _evaluate(self, x: Tensor, tokens: Tensor, time: int) -> tuple[Tensor, list[KeysAndValues]]:
        """Velocity [frames, mel_bins] at one time; keys and values of past and current frames.

        x [frames, mel_bins], tokens int64 [frames].
        """
        current = []

        def attend(query: Tensor, keys: Tensor, values: Tensor, layer: int) -> Tensor:
            if self.past:
                past_keys, past_values = self.past[layer]
                keys, values = torch.cat([past_keys, keys], 1), torch.cat([past_values, values], 1)
            current.append((keys, values))
            return F.scaled_dot_product_attention(query[None], keys[None], values[None])[0]

        blocks, final = self.dit.modulation(tokens, torch.tensor([time], device=tokens.device))
        positions = torch.arange(self.position, self.position + len(x), device=tokens.device)
        rotary = self.dit.rotary(positions)
        return self.dit(x, StepConditioning(list(blocks), final), rotary, attend), current


class PlainActivation(nn.Module):
    """SnakeBeta at twice the rate of x [..., channels, time], as separate operations."""

    def __init__(self, act: SnakeBeta):
        super().__init__()
        self.act = act
        self.taps = torch.tensor(low_pass_filter(), device=act.alpha.device)

    def forward(self, x: Tensor) -> Tensor:
        channels, dtype, x = x.shape[-2], x.dtype, x.float()
        taps = self.taps.expand(channels, 1, -1)
        x = F.pad(x, (5, 5), mode="replicate")
        x = 2 * F.conv_transpose1d(x, taps, stride=2, groups=channels)
        x = x[..., 15:-15]
        alpha, beta = self.act.alpha.float()[:, None].exp(), self.act.beta.float()[:, None].exp()
        x = x + (1.0 / (beta + 1e-9)) * torch.sin(x * alpha).pow(2)
        x = F.pad(x, (5, 6), mode="replicate")
        return F.conv1d(x, taps, stride=2, groups=channels).to(dtype)
