"""The published algorithm from codes to a waveform: the baseline of the speed comparison.

Same results and parameters as the library's Detokenizer, with the operations of the published
implementation: adaLN modulation of every frame in every network call, keys and values of the past
concatenated in every call, and the vocoder's rate changes as grouped convolutions between explicit
paddings. Weight norm is folded in both.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimia_infer.models.kimi_audio.detokenizer import (
    CACHE_TIMESTEP,
    Detokenizer,
    Noise,
    StreamConfig,
    WaveOverlap,
)
from kimia_infer.models.kimi_audio.dit import (
    NORM_EPS,
    TIMESTEP_FEATURES,
    TIMESTEP_PERIOD,
    Attention,
    Block,
    DiT,
)
from kimia_infer.models.kimi_audio.vocoder import (
    AntiAliasedSnake,
    ResidualBlock,
    Vocoder,
    low_pass_filter,
)

KeysAndValues = tuple[Tensor, Tensor]


def synthesize(detokenizer: Detokenizer, codes: Tensor, noise: Noise) -> Tensor:
    """The wave fp32 [1, samples] of the codes int64 [n], as ``Detokenizer.synthesize``.

    Only for utterances that end before the position limit of the stream.
    """
    config, vocoder = detokenizer.config, PlainVocoder(detokenizer.vocoder)
    mel_stream, overlap = PlainMelStream(detokenizer.dit, noise, config), WaveOverlap(vocoder)
    chunks = codes.split(config.chunk_codes)
    waves = []
    with torch.no_grad():
        for index, chunk in enumerate(chunks, 1):
            final = index == len(chunks)
            waves.append(overlap.push(mel_stream.push(chunk, final), final).float())
    return torch.cat(waves)[None]


class PlainMelStream:
    """Chunks of codes to mel; ``past`` holds keys and values [heads, frames, head_dim] by layer."""

    def __init__(self, dit: DiT, noise: Noise, config: StreamConfig):
        self.dit, self.noise, self.config = dit, noise, config
        self.past: list[KeysAndValues] | None = None
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
        tokens = codes.repeat_interleave(config.frames_per_code)
        x = self.noise(self.chunks, len(tokens)).to(self.dit.device, self.dit.dtype)
        times = torch.linspace(0, 1, config.ode_points).tolist()
        current: list[KeysAndValues] = []
        for start, end in pairwise(times):
            velocity, current = evaluate(
                self.dit, x, tokens, int(1000 * start), self.position, self.past
            )
            x = x + (end - start) * velocity
        x = x[: kept * config.frames_per_code]
        if kept < len(codes):
            tokens = tokens[: len(x)]
            _, current = evaluate(self.dit, x, tokens, CACHE_TIMESTEP, self.position, self.past)
        self.past = [
            (keys[:, -config.cache_frames :], values[:, -config.cache_frames :])
            for keys, values in current
        ]
        self.position += len(x)
        self.chunks += 1
        return x * self.dit.config.mel_std + self.dit.config.mel_mean


def evaluate(
    dit: DiT, x: Tensor, tokens: Tensor, time: int, position: int, past: list[KeysAndValues] | None
) -> tuple[Tensor, list[KeysAndValues]]:
    """Velocity [frames, mel_bins] at one time; keys and values of past and current frames.

    x [frames, mel_bins], tokens int64 [frames].
    """
    condition = _time(dit, time) + dit.semantic_token_embedding(tokens.to(dit.device))
    rotary = torch.view_as_complex(dit.rotary(position, len(x)))
    x = _linear(dit.input_linear, x)
    current = []
    for index, block in enumerate(dit.blocks):
        x, kept = _block(block, x, condition, rotary, past and past[index])
        current.append(kept)
    shift, scale = _linear(dit.final_layer.adaLN_modulation[1], F.silu(condition)).chunk(2, dim=-1)
    return _linear(dit.final_layer.linear, _modulate(x, shift, scale)), current


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """``nn.Linear.forward``, whatever replaces it in the library."""
    return F.linear(x, layer.weight, layer.bias)


def _time(dit: DiT, time: int) -> Tensor:
    """Embedding [1, hidden_size] of an integer time."""
    frequencies = torch.arange(TIMESTEP_FEATURES // 2, device=dit.device) / (TIMESTEP_FEATURES // 2)
    angles = time * torch.exp(-math.log(TIMESTEP_PERIOD) * frequencies)
    waves = torch.cat([angles.cos(), angles.sin()])[None].to(dit.dtype)
    first, _, second = dit.t_embedder.mlp
    return _linear(second, F.silu(_linear(first, waves)))


def _block(
    block: Block, x: Tensor, condition: Tensor, rotary: Tensor, past: KeysAndValues | None
) -> tuple[Tensor, KeysAndValues]:
    modulation = _linear(block.adaLN_modulation[1], F.silu(condition)).chunk(6, dim=-1)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation
    mixed, kept = _attention(block.attn, _modulate(x, shift, scale), rotary, past)
    x = x + gate * mixed
    inner = _linear(block.mlp.fc1, _modulate(x, shift_mlp, scale_mlp))
    return x + gate_mlp * _linear(block.mlp.fc2, F.gelu(inner, approximate="tanh")), kept


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * (1 + scale) + shift


def _attention(
    attention: Attention, x: Tensor, rotary: Tensor, past: KeysAndValues | None
) -> tuple[Tensor, KeysAndValues]:
    qkv = _linear(attention.qkv, x).view(len(x), 3, attention.heads, -1)
    query, keys, values = qkv.permute(1, 2, 0, 3)
    query, keys = _rotate(query, rotary), _rotate(keys, rotary)
    if past is not None:
        keys, values = torch.cat([past[0], keys], dim=1), torch.cat([past[1], values], dim=1)
    mixed = F.scaled_dot_product_attention(query[None], keys[None], values[None])[0]
    return _linear(attention.proj, mixed.transpose(0, 1).reshape(x.shape)), (keys, values)


def _rotate(x: Tensor, rotary: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotary).flatten(-2).to(x.dtype)


class PlainVocoder:
    """A Vocoder whose activations are separate operations, with the same parameters."""

    def __init__(self, vocoder: Vocoder):
        self.vocoder = vocoder
        self.config, self.device, self.dtype = vocoder.config, vocoder.device, vocoder.dtype
        self.taps = torch.tensor(low_pass_filter(), device=self.device)

    def __call__(self, mel: Tensor) -> Tensor:
        """Wave [hop_size * frames] in -1 .. 1 of a natural-log mel [frames, mel_bins]."""
        vocoder = self.vocoder
        x = vocoder.conv_pre(mel.T[None])
        branches = len(self.config.resblock_kernel_sizes)
        for stage, up in enumerate(vocoder.ups):
            x = up(x)
            blocks = vocoder.resblocks[stage * branches : (stage + 1) * branches]
            total = self._residual(blocks[0], x)
            for block in blocks[1:]:
                total = total + self._residual(block, x)
            x = total / branches
        wave = vocoder.conv_post(self._activation(vocoder.activation_post, x))
        return wave.clamp(-1, 1)[0, 0]

    def _residual(self, block: ResidualBlock, x: Tensor) -> Tensor:
        before, between = block.activations[::2], block.activations[1::2]
        for first, dilated, second, plain in zip(
            before, block.convs1, between, block.convs2, strict=True
        ):
            inner = dilated(self._activation(first, x))
            x = x + plain(self._activation(second, inner))
        return x

    def _activation(self, activation: AntiAliasedSnake, x: Tensor) -> Tensor:
        """x [1, channels, time]: twice the rate, SnakeBeta, and back."""
        channels, dtype, x = x.shape[1], x.dtype, x.float()
        taps = self.taps.expand(channels, 1, -1)
        x = F.pad(x, (5, 5), mode="replicate")
        x = 2 * F.conv_transpose1d(x, taps, stride=2, groups=channels)
        x = x[..., 15:-15]
        alpha = activation.act.alpha.float()[:, None].exp()
        beta = activation.act.beta.float()[:, None].exp()
        x = x + (1.0 / (beta + 1e-9)) * torch.sin(x * alpha).pow(2)
        x = F.pad(x, (5, 6), mode="replicate")
        return F.conv1d(x, taps, stride=2, groups=channels).to(dtype)
