"""Which frames of a recording belong to which phoneme.

A small network of ours compares frames with phonemes; the best way through the phonemes in their
order is then found exactly. It learned from speech of Kokoro itself, whose durations are known, so
that it divides sound as Kokoro does, stress marks, spaces and punctuation included. Aligners that
others maintain give phonemes of their own alphabets, without those.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from kimia_infer.models.kokoro.layers import BiLSTM, Rows
from kimia_infer.models.kokoro.measures import MELS

BOUNDARY = "|"
"""Stands for the symbol before and behind every utterance."""

_MARKS = "ˈˌː"
WEIGHTS_NAME = "aligner.safetensors"

FURTHEST = -6.0
"""Logarithm of the least share that a frame has in the fit."""
SOUNDING = 0.01
"""Power of a frame with sound, relative to the loud ones."""

_FLOOR = 1e-4  # of the power in a band, of recordings of one level


@dataclass(frozen=True)
class Alignment:
    """``durations`` int64 [symbols], frames of 25 ms, both boundaries included, each at least one.

    ``fit``, 0 .. 1, says how much frames with sound resemble their phonemes, relative to those that
    they resemble most: the geometric mean of these shares, whatever the text is.
    """

    durations: Tensor
    fit: float


class Aligner(nn.Module):
    """Scores of every frame for every symbol of a text, by the similarity of two vectors.

    ``symbols`` are those it knows, the boundary first. ``kinds`` says which of them a frame sounds
    like, whatever the text.
    """

    def __init__(self, symbols: str, width: int):
        super().__init__()
        self.symbols, self.width = symbols, width
        self.spoken = nn.ModuleList([BiLSTM(2 * MELS, width), BiLSTM(width, width)])
        self.kinds = nn.Linear(width, len(symbols))
        self.known = nn.Embedding(len(symbols), width)
        self.written = nn.ModuleList([BiLSTM(width, width), BiLSTM(width, width)])
        self.query, self.key = nn.Linear(width, width), nn.Linear(2 * width, width)

    def forward(
        self, sound: Tensor, frames: Rows, ids: Tensor, rows: Rows
    ) -> tuple[Tensor, Tensor]:
        """Scores [batch, frames, time], and logits of kinds [batch, frames, symbols].

        ``sound`` [batch, frames, 2 * MELS], and ``ids`` [batch, time] of the text.
        """
        for lstm in self.spoken:
            sound = lstm(sound, frames)
        known = x = self.known(ids)
        for lstm in self.written:
            x = lstm(x, rows)
        keys = self.key(torch.cat([known, x], dim=-1))
        return self.query(sound) @ keys.mT / self.width**0.5, self.kinds(sound)

    def ids(self, phonemes: str) -> Tensor:
        """int64 [time] of phonemes between two boundaries. KeyError for what it does not know."""
        known = {symbol: number for number, symbol in enumerate(self.symbols)}
        return torch.tensor([known[symbol] for symbol in (BOUNDARY, *phonemes, BOUNDARY)])

    @torch.inference_mode()
    def align(self, power: Tensor, phonemes: str) -> Alignment:
        """The alignment of phonemes with the power in bands [values, MELS] of a recording.

        Raises:
            ValueError: there are fewer frames than symbols.
            KeyError: a phoneme that it does not know.
        """
        ids = self.ids(phonemes)
        scores, kinds = self(sound_of(power)[None], Rows(), ids[None], Rows())
        durations = torch.from_numpy(best_durations(scores[0].numpy()))
        given = ids.repeat_interleave(durations)
        levels = power.unflatten(0, (-1, 2)).sum((1, 2))
        phones = torch.tensor(
            [c.isalpha() and c not in _MARKS for c in (BOUNDARY, *phonemes, BOUNDARY)]
        )
        counted = phones.repeat_interleave(durations) & (levels > SOUNDING * levels.quantile(0.9))
        logs = kinds[0].log_softmax(-1)
        below = logs.gather(1, given[:, None])[:, 0] - logs.max(1).values
        fit = below[counted].clamp(min=FURTHEST).mean().exp() if counted.any() else 0.0
        return Alignment(durations, float(fit))


def sound_of(power: Tensor) -> Tensor:
    """What the network hears: [values, MELS] -> [values / 2, 2 * MELS].

    Level and colour of a recording are taken out of it, each pair of values is a frame.
    """
    loud = power.sum(1).quantile(0.9)
    logs = torch.log(power / loud + _FLOOR)
    return ((logs - logs.mean(0)) / 4).unflatten(0, (-1, 2)).flatten(1)


def best_durations(scores: np.ndarray) -> np.ndarray:
    """The frames of each symbol, int64 [symbols], whose ``scores`` [frames, symbols] are largest.

    Symbols follow each other in order, each for at least one frame. ValueError if there are fewer
    frames than symbols.
    """
    frames, symbols = scores.shape
    if frames < symbols:
        raise ValueError(f"{symbols} symbols, but {frames} frames")
    best = np.full(symbols, -np.inf)
    best[0] = scores[0, 0]
    entered = np.zeros((frames, symbols), bool)
    for frame in range(1, frames):
        before = np.concatenate([[-np.inf], best[:-1]])
        entered[frame] = before > best
        best = np.maximum(best, before) + scores[frame]
    durations = np.zeros(symbols, np.int64)
    symbol = symbols - 1
    for frame in range(frames - 1, -1, -1):
        durations[symbol] += 1
        symbol -= int(entered[frame, symbol])
    return durations


def load_aligner(path: Path | None = None) -> Aligner:
    """The aligner that comes with the package, or another one."""
    path = path or Path(str(files("kimia_infer.models.kokoro") / WEIGHTS_NAME))
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    aligner = Aligner(facts["symbols"], int(facts["width"]))
    aligner.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return aligner.requires_grad_(False).eval()
