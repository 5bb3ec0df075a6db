"""The whole network: phonemes and a style to a wave, a batch at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kimia_infer.models.kokoro.config import HARMONICS, KokoroConfig
from kimia_infer.models.kokoro.decoder import Decoder
from kimia_infer.models.kokoro.layers import Rows
from kimia_infer.models.kokoro.prosody import (
    ProsodyPredictor,
    repeat_phonemes,
    round_durations,
)
from kimia_infer.models.kokoro.text_encoder import TextEncoder

Noise = Callable[[int, int], Tensor]
"""(row, samples) -> float32 [samples, HARMONICS], standard normal."""


@dataclass(frozen=True)
class Prosody:
    """How the rows of a batch are to be spoken.

    ``durations`` int64 [batch, time] are whole frames of 25 ms for each symbol, the boundaries
    included. ``text`` [batch, frames, channels], ``pitch`` in Hz and ``energy``, both
    [batch, 2 * frames], are zero behind the end of a row, which ``rows`` gives in frames.
    """

    durations: Tensor
    text: Tensor
    pitch: Tensor
    energy: Tensor
    rows: Rows


class KokoroNetwork(nn.Module):
    """Parameters are named as in the published checkpoint, weight norm folded.

    Prosody is computed in float32, so that durations do not depend on the dtype of the decoder.
    """

    def __init__(self, config: KokoroConfig):
        from kimia_infer.models.kokoro.albert import Albert  # imports transformers

        super().__init__()
        self.config = config
        self.bert = Albert(config.plbert, config.n_token)
        self.bert_encoder = nn.Linear(config.plbert.hidden_size, config.hidden_dim)
        self.predictor = ProsodyPredictor.of(config)
        self.text_encoder = TextEncoder.of(config)
        self.decoder = Decoder(config)

    @property
    def device(self) -> torch.device:
        return self.bert_encoder.weight.device

    def prosody(self, ids: Tensor, style: Tensor, speed: Tensor, rows: Rows) -> Prosody:
        """Durations, pitch and energy.

        Args:
            ids: int64 [batch, time], both boundaries (0) included.
            style: [batch, 2 * style], the rows of voices.
            speed: [batch], by which durations are divided.
            rows: lengths of the rows in symbols.
        """
        _, style = style.chunk(2, dim=-1)
        encoded = self.bert_encoder(self.bert.encode(ids, rows))
        d = self.predictor.text_encoder(encoded, style, rows)
        durations = round_durations(self.predictor.durations(d, rows), speed, rows)
        return self.spoken_as(ids, d, style, durations, rows)

    def spoken_as(
        self, ids: Tensor, d: Tensor, style: Tensor, durations: Tensor, rows: Rows
    ) -> Prosody:
        """Pitch and energy for given durations; ``d`` are the encoded phonemes of prosody."""
        lengths = durations.sum(1)
        longest = int(lengths.max())
        frames = Rows() if len(ids) == 1 else Rows(lengths)
        repeated = repeat_phonemes(d, durations, longest)
        pitch, energy = self.predictor.curves(repeated, style, frames)
        text = repeat_phonemes(self.text_encoder(ids, rows), durations, longest)
        return Prosody(durations, text, pitch, energy, frames)

    def waves(self, prosody: Prosody, style: Tensor, noise: Noise | None = None) -> list[Tensor]:
        """The wave of each row, float32 [samples] at 24 kHz, about -0.5 .. 0.5 and not clipped.

        style [batch, 2 * style]; without ``noise`` the source has none.
        """
        timbre, _ = style.chunk(2, dim=-1)
        samples = (prosody.durations.sum(1) * self.config.frame_samples).tolist()
        drawn = None
        if noise is not None:
            drawn = torch.zeros(len(samples), max(samples), HARMONICS, device=timbre.device)
            for row, count in enumerate(samples):
                drawn[row, :count] = noise(row, count)
        found = self.decoder(
            prosody.text, prosody.pitch, prosody.energy, timbre, prosody.rows, drawn
        )
        return [wave[:count] for wave, count in zip(found, samples, strict=True)]


def batch_of(utterances: list[list[int]], device: torch.device) -> tuple[Tensor, Rows]:
    """Symbols of each utterance, without boundaries, as ids [batch, time] and their rows."""
    rows = [torch.tensor([0, *symbols, 0]) for symbols in utterances]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, Rows() if len(rows) == 1 else Rows(lengths)
