"""Where a chunk of speech passes into the next one."""

from __future__ import annotations

import math

import torch

from kimia_infer.models.kimi_audio.vocoder import _cross_fade


def test_cross_fade_keeps_the_published_gain() -> None:
    """Old and new overlap under the two halves of a periodic Hamming window."""
    new, old = torch.full((8,), 2.0), torch.full((5,), 3.0)
    window = [0.54 - 0.46 * math.cos(2 * math.pi * i / 8) for i in range(8)]
    expected = [3 * window[4 + i] + 2 * window[i] for i in range(4)] + [2.0] * 4
    torch.testing.assert_close(_cross_fade(old, new), torch.tensor(expected), atol=1e-4, rtol=0)


def test_bf16_waves_are_faded_with_a_rounded_fp32_window() -> None:
    ones = torch.ones(480, dtype=torch.bfloat16)
    faded = _cross_fade(ones, torch.zeros(960, dtype=torch.bfloat16))
    window = torch.hamming_window(960).bfloat16()
    assert torch.equal(faded[:480], window[480:])
