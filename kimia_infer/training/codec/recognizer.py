"""Layers that teach an encoder of speech: they recognize text and phones from its output."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimia_infer.models.kimi_audio.whisper import FRAMES_PER_CODE

BLANK = 0
MELS_PER_FRAME = 2  # the second convolution of the encoder


class ConvolutionBlock(nn.Module):
    """Normalization, convolution over time and a feed-forward layer, added to the input."""

    def __init__(self, width: int, kernel: int = 5):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv1d(width, width, kernel, padding=kernel // 2)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """x [batch, time, width] -> the same shape.

        Where ``valid`` [batch, time, 1] is not, neighbors see zeros, as behind the end of a sound.
        """
        return x + self.out(F.gelu(self.conv((self.norm(x) * valid).mT).mT))


class Recognizer(nn.Module):
    """Layers above the codes: characters and phones at 50 Hz, words at 12.5 Hz, the spectrogram.

    Args:
        width: of the vectors.
        layers: convolution blocks.
        characters: ids with the blank; 0: no such output. ``words`` likewise.
        mels: bands of the spectrogram at 100 Hz; 0: no such output.
        phones: without a blank; 0: no such output.
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

    def word_scores(self, frames: Tensor) -> Tensor:
        """[batch, codes, words]."""
        return self.words(frames.unflatten(1, (-1, FRAMES_PER_CODE)).mean(2))

    def spectrogram(self, frames: Tensor) -> Tensor:
        """[batch, mels, 8 * codes]."""
        return self.mel(frames).unflatten(2, (MELS_PER_FRAME, -1)).flatten(1, 2).mT


def ctc(scores: Tensor, lengths: Tensor, targets: Sequence[Tensor]) -> Tensor:
    """CTC per target unit, float32 [batch], of scores [batch, time, units]."""
    logs = scores.float().log_softmax(-1).transpose(0, 1)
    sizes = torch.tensor([len(target) for target in targets], device=lengths.device)
    joined = torch.cat(list(targets)).to(scores.device)
    found = F.ctc_loss(logs, joined, lengths, sizes, blank=BLANK, reduction="none")
    return found / sizes
