"""Codes of both tokenizers to one sequence of audio tokens, and that to rows for the flow.

A group is 2 codes of VQ02 and 3 of VQ06, 120 ms of sound. Audio token n is a VQ02 code below 1024,
and above it a VQ06 code plus 1024.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kimia_infer.utils.errors import RequestError

VQ02_CODES, VQ06_CODES = 1024, 4096
AUDIO_TOKENS = VQ02_CODES + VQ06_CODES

VQ02_PER_GROUP, VQ06_PER_GROUP = 2, 3
GROUP = VQ02_PER_GROUP + VQ06_PER_GROUP
GROUP_SECONDS = 0.12
TOKENS_PER_SECOND = GROUP / GROUP_SECONDS

TABLE_ROWS = AUDIO_TOKENS + 1
"""Of the flow's embedding: VQ02 codes, one for no code, then VQ06 codes."""
NO_CODE = VQ02_CODES

ROWS_PER_GROUP = VQ06_PER_GROUP
FRAMES_PER_GROUP = 2 * ROWS_PER_GROUP
"""Mel frames of 20 ms."""


def interleave(vq02: Sequence[int], vq06: Sequence[int]) -> list[int]:
    """Audio tokens of the groups that are whole in both; other codes are left out."""
    tokens = []
    for group in range(min(len(vq02) // VQ02_PER_GROUP, len(vq06) // VQ06_PER_GROUP)):
        tokens += vq02[group * VQ02_PER_GROUP : (group + 1) * VQ02_PER_GROUP]
        codes = vq06[group * VQ06_PER_GROUP : (group + 1) * VQ06_PER_GROUP]
        tokens += [VQ02_CODES + code for code in codes]
    return tokens


def whole_groups(tokens: Sequence[int]) -> list[int]:
    """``tokens`` without a last group that is not complete.

    The published code fills it up with code 0, up to 80 ms of other sound.
    """
    return list(tokens[: len(tokens) // GROUP * GROUP])


def flow_rows(tokens: Sequence[int]) -> Tensor:
    """Rows of the flow's table for audio tokens of whole groups, int64 [rows, 2].

    A row is a VQ02 code, or none, and a VQ06 code. As published, a token is looked up as it is
    where its group should have one of the other tokenizer.

    Raises:
        RequestError: there is no token, or one that is no audio.
    """
    if not tokens:
        raise RequestError("no audio was produced: the answer has no whole group of audio tokens")
    bad = next((token for token in tokens if not 0 <= token < AUDIO_TOKENS), None)
    if bad is not None:
        raise RequestError(f"the answer holds {bad}, which is no audio token (0 .. 5119)")
    groups = torch.tensor(tokens).view(-1, GROUP)
    first = torch.full((len(groups), ROWS_PER_GROUP), NO_CODE)
    first[:, :VQ02_PER_GROUP] = groups[:, :VQ02_PER_GROUP]
    return torch.stack([first.flatten(), groups[:, VQ02_PER_GROUP:].flatten() + 1], dim=1)


def aligned_mel(mel: Tensor, rows: int) -> Tensor:
    """Two frames for each of ``rows``, by the nearest of ``mel`` [frames, bins].

    The mel spectrogram is of the whole recording and the codes of its trimmed sound, so that this
    stretches the one to the other, as published.
    """
    wanted = 2 * rows
    return mel[torch.arange(wanted, device=mel.device) * len(mel) // wanted]
