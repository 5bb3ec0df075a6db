"""Rows of codes to a mel spectrogram in the voice of a prompt, by flow matching.

The package stepaudio2-minicpmo has these networks; importing it takes torchaudio, which has no
release for the PyTorch used here, diffusers, s3tokenizer and onnxruntime.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimia_infer.audio.files import Check
from kimia_infer.models.step_audio_editx.config import FlowConfig
from kimia_infer.models.step_audio_editx.conformer import Encoder
from kimia_infer.models.step_audio_editx.dit import DiT
from kimia_infer.models.step_audio_editx.packing import TABLE_ROWS
from kimia_infer.models.step_audio_editx.past import Past

STEPS = 10
"""Of the integration, published call."""

RECENT_FRAMES = 480
"""A chunk attends to the prompt and at most so many frames before it, 9.6 s. With every frame that
is kept the memory of a stream grows by 1.3 MB at the published size. The published streaming keeps
1000 frames, prompt included, and goes back to 96 behind the prompt when there are more."""


class DualEmbedding(nn.Module):
    """Two codes of a row in one table, side by side."""

    def __init__(self, width: int):
        super().__init__()
        self.embedding = nn.Embedding(TABLE_ROWS, width // 2)

    def forward(self, rows: Tensor) -> Tensor:
        """rows int64 [..., 2] -> [..., width]."""
        return self.embedding(rows).flatten(-2)


class Decoder(nn.Module):
    def __init__(self, config: FlowConfig):
        super().__init__()
        self.estimator = DiT(config.decoder.estimator)


class Flow(nn.Module):
    """Parameters are named as in the published checkpoint."""

    def __init__(self, config: FlowConfig):
        super().__init__()
        self.config = config
        self.input_embedding = DualEmbedding(config.width)
        self.spk_embed_affine_layer = nn.Linear(config.speaker, config.mel_bins)
        self.encoder = Encoder(config.encoder)
        self.encoder_proj = nn.Linear(config.encoder.width, config.mel_bins)
        self.decoder = Decoder(config)

    def forward(
        self,
        rows: Tensor,
        prompt_rows: Tensor,
        prompt_mel: Tensor,
        speaker: Tensor,
        noise: Tensor,
        check: Check = lambda: None,
    ) -> Tensor:
        """Mel float32 [2 * rows, bins], in one piece as published.

        Args:
            rows: int64 [rows, 2] to be spoken.
            prompt_rows: those of the prompt, int64 [prompt rows, 2].
            prompt_mel: its spectrogram, [2 * prompt rows, bins].
            speaker: the vector of the voice, [speaker].
            noise: standard normal [2 * (prompt rows + rows), bins].
            check: called between steps; raises to end them.
        """
        stream = MelStream(self, prompt_rows, prompt_mel, speaker, lambda frames: noise, check)
        return stream.push(rows, last=True)

    def velocity(self, x: Tensor, conditions: Tensor, time: Tensor, past: Past) -> Tensor:
        """With conditions [frames, 3 * bins], guided away from the velocity without them."""
        given = torch.cat([x, conditions], dim=-1)
        none = torch.cat([x, torch.zeros_like(conditions)], dim=-1)
        both = self.decoder.estimator(torch.stack([given, none]), time.expand(2), past)
        rate = self.config.decoder.guidance
        return (1 + rate) * both[0] - rate * both[1]


class MelStream:
    """Rows to a mel spectrogram chunk by chunk, in the voice of a prompt.

    A chunk attends to itself and to the chunks before, as they were computed, as in the published
    streaming: frames that are made before others are known cannot be those that all of them give.
    The first chunk has the prompt in it. The last rows of a chunk, the look-ahead of the encoder,
    are spoken with the next one. The arguments are those of :meth:`Flow.forward`, but ``noise``
    gives the next frames, as many as it is called with.
    """

    def __init__(
        self,
        flow: Flow,
        prompt_rows: Tensor,
        prompt_mel: Tensor,
        speaker: Tensor,
        noise: Callable[[int], Tensor],
        check: Check = lambda: None,
    ):
        self._flow, self._noise, self._check = flow, noise, check
        self._waiting, self._known = prompt_rows, prompt_mel
        self._voice = flow.spk_embed_affine_layer(F.normalize(speaker, dim=0))
        self._spoken, self._encoder_past = 0, Past()
        reach = len(prompt_mel), RECENT_FRAMES
        self._pasts = [Past(reach) for _ in range(STEPS)]

    def push(self, rows: Tensor, last: bool) -> Tensor:
        """Mel float32 [frames, bins] of the next rows int64 [rows, 2], less the look-ahead.

        There must be more rows than those of the look-ahead; with ``last`` all are spoken.
        """
        flow, rows = self._flow, torch.cat([self._waiting, rows])
        for past in (self._encoder_past, *self._pasts):
            past.last = last
        embedded = flow.input_embedding(rows)[None]
        wanted = flow.encoder_proj(flow.encoder(embedded, self._encoder_past, self._spoken)[0])
        spoken = len(wanted) // flow.config.encoder.rate
        self._waiting, self._spoken = rows[spoken:], self._spoken + spoken
        known = F.pad(self._known, (0, 0, 0, len(wanted) - len(self._known)))
        conditions = torch.cat([wanted, self._voice.expand_as(wanted), known], dim=-1)
        mel = self._integrate(self._noise(len(wanted)), conditions)[len(self._known) :]
        self._known = self._known[:0]
        return mel

    def _integrate(self, x: Tensor, conditions: Tensor) -> Tensor:
        """Euler steps from noise x [frames, bins], more of them near the begin."""
        times = 1 - torch.cos(torch.linspace(0, 1, STEPS + 1, device=x.device) * (math.pi / 2))
        time = times[0]
        for following, past in zip(times[1:], self._pasts, strict=True):
            self._check()
            step = following - time
            x = x + step * self._flow.velocity(x, conditions, time, past)
            time = time + step
        return x
