"""What teaches an encoder of speech: recognition of characters, words and phones.

Recordings come with their texts; the units of all of them and the layers that recognize these.
"""

from __future__ import annotations

import json
import zlib
from bisect import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimia_infer.audio.files import SAMPLE_RATE
from kimia_infer.data.conversations import DataError
from kimia_infer.models.kimi_audio.config import FRAMES_PER_CODE
from kimia_infer.models.kimi_audio.encoders import CODE_SAMPLES
from kimia_infer.training.tasks.codec import Data

BLANK = 0
MELS_PER_FRAME = 2  # the second convolution of the encoder

SILENCE = "_"
"""The phone before the first; espeak-ng's name of a pause."""


@dataclass(frozen=True)
class Units:
    """The characters, words and phones of all texts, in order.

    Character or word i has the id i + 1, after the blank; phone i has the id i.
    """

    characters: tuple[str, ...]
    words: tuple[str, ...]
    phones: tuple[str, ...] = ()

    @cached_property
    def mark(self) -> Tensor:
        """Int64 [1], by which a run knows its units."""
        described = json.dumps([self.characters, self.words, self.phones])
        return torch.tensor([zlib.crc32(described.encode())])

    @classmethod
    def of(cls, texts: Iterable[str], phones: Iterable[str] = ()) -> Units:
        texts = [normal(text) for text in texts]
        characters = {character for text in texts for character in text}
        words = {word for text in texts for word in text.split()}
        return cls(*(tuple(sorted(units)) for units in (characters, words, set(phones))))

    def character_ids(self, text: str) -> Tensor:
        return torch.tensor([bisect(self.characters, character) for character in normal(text)])

    def phone_ids(self, names: Sequence[str]) -> Tensor:
        return torch.tensor([self.phones.index(name) for name in names])

    def word_ids(self, text: str) -> Tensor:
        return torch.tensor([bisect(self.words, word) for word in normal(text).split()])


def normal(text: str) -> str:
    """Lower case, single spaces."""
    return " ".join(text.lower().split())


def frames_needed(ids: Sequence[object]) -> int:
    """The frames that CTC needs: one for each, and a blank between equal neighbors."""
    return len(ids) + sum(a == b for a, b in pairwise(ids))


def units_of(data: Data) -> Units:
    recordings = [r for samples in data if samples is not None for r in samples.items]
    phones = {name for recording in recordings for name, _ in recording.phones or ()}
    return Units.of((recording.text or "" for recording in recordings), phones | {SILENCE})


def check_speakable(text: str, codes: int, characters: bool = True, words: bool = True) -> None:
    """Raise DataError if a recording of ``codes`` is too short for the units that are learned."""
    text = normal(text)
    for learned, units, room, name in (
        (characters, text, FRAMES_PER_CODE * codes, "characters"),
        (words, text.split(), codes, "words"),
    ):
        if learned and frames_needed(units) > room:
            seconds = codes * CODE_SAMPLES / SAMPLE_RATE
            raise DataError(f"text: {len(units)} {name} cannot be spoken in {seconds:.2f} s")


class ConvolutionBlock(nn.Module):
    """Normalization, convolution over time and a feed-forward layer, added to the input."""

    def __init__(self, width: int, kernel: int = 5):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv1d(width, width, kernel, padding=kernel // 2)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """Of x [batch, time, width]; where ``valid`` [batch, time, 1] is False, zeros are seen."""
        return x + self.out(F.gelu(self.conv((self.norm(x) * valid).mT).mT))


class Recognizer(nn.Module):
    """Layers above the codes, vectors of ``width``, and four outputs, absent where their size is 0.

    These are ``characters`` and ``words``, with a blank, at 50 and 12.5 Hz, the spectrogram of
    ``mels`` bands at 100 Hz and ``phones`` at 50 Hz.
    """

    def __init__(
        self, width: int, layers: int, characters: int, words: int, mels: int, phones: int = 0
    ):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.spread = nn.Linear(width, FRAMES_PER_CODE * width)
        self.blocks = nn.ModuleList(ConvolutionBlock(width) for _ in range(layers))
        self.last_norm = nn.LayerNorm(width)
        self.characters = nn.Linear(width, characters) if characters else None
        self.words = nn.Linear(width, words) if words else None
        self.mel = nn.Linear(width, MELS_PER_FRAME * mels) if mels else None
        self.phones = nn.Linear(width, phones) if phones else None

    def forward(self, vectors: Tensor, counts: Tensor) -> Tensor:
        """Frames [batch, 4 * codes, width] of vectors [batch, codes, width], ``counts`` valid."""
        places = torch.arange(vectors.shape[1], device=vectors.device)
        x = self.norm(vectors) * (places < counts[:, None])[:, :, None]
        valid = (places < counts[:, None]).repeat_interleave(FRAMES_PER_CODE, 1)[:, :, None]
        x = self.spread(x).unflatten(2, (FRAMES_PER_CODE, -1)).flatten(1, 2) * valid
        for block in self.blocks:
            x = block(x, valid)
        return self.last_norm(x)


def ctc(scores: Tensor, lengths: Tensor, targets: Sequence[Tensor]) -> Tensor:
    """CTC per target unit, float32 [batch], of scores [batch, time, units]."""
    logs = scores.float().log_softmax(-1).transpose(0, 1)
    sizes = torch.tensor([len(target) for target in targets], device=lengths.device)
    joined = torch.cat(list(targets)).to(scores.device)
    found = F.ctc_loss(logs, joined, lengths, sizes, blank=BLANK, reduction="none")
    return found / sizes
