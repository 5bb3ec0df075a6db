"""What a speech stream refuses, and how it says so."""

from __future__ import annotations

import pytest
import torch

from kimia_infer.models.kimi_audio.detokenizer import Detokenizer, Noise
from kimia_infer.models.kimi_audio.dit import DiT
from kimia_infer.models.kimi_audio.flow import StreamConfig
from kimia_infer.models.kimi_audio.vocoder import Vocoder


def silence(dit: DiT) -> Noise:
    return lambda chunk, frames: torch.zeros(frames, dit.config.mel_bins)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.empty(0, dtype=torch.int64), "no speech codes"),
        (torch.tensor([0, -1]), "speech code -1 is outside"),
        (torch.tensor([0.0]), "int64"),
        (torch.zeros(1, 3, dtype=torch.int64), "int64"),
    ],
)
def test_bad_codes(codes: torch.Tensor, message: str, dit: DiT, vocoder: Vocoder) -> None:
    detokenizer = Detokenizer(dit, vocoder)
    with pytest.raises(ValueError, match=message):
        detokenizer.synthesize(codes, silence(dit))
    with pytest.raises(ValueError, match=message):
        detokenizer.start(silence(dit)).push(codes, final=True)


def test_first_code_outside_the_code_book(dit: DiT, vocoder: Vocoder) -> None:
    size = dit.config.codes
    detokenizer = Detokenizer(dit, vocoder, StreamConfig(ode_points=2))
    assert detokenizer.synthesize(torch.tensor([size - 1]), silence(dit)).numel()
    with pytest.raises(ValueError, match=rf"speech code {size} is outside 0\.\.{size - 1}"):
        detokenizer.synthesize(torch.tensor([size]), silence(dit))


def test_misuse_of_a_stream(dit: DiT, vocoder: Vocoder) -> None:
    detokenizer = Detokenizer(dit, vocoder, StreamConfig(ode_points=2))
    stream = detokenizer.start(silence(dit))
    with pytest.raises(ValueError, match="at most 30 codes, found 31"):
        stream.push(torch.arange(31), final=True)
    stream.push(torch.arange(2), final=False)
    voice = torch.zeros(8, dit.config.mel_bins), torch.zeros(8, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="before the first speech codes"):
        stream.prefill(*voice)
    stream.push(torch.arange(2), final=True)
    with pytest.raises(RuntimeError, match="has ended"):
        stream.push(torch.arange(2), final=True)
    bad_noise = detokenizer.start(lambda chunk, frames: torch.zeros(frames + 1, 3))
    with pytest.raises(ValueError, match=r"noise of chunk 0 has shape \[5, 3\]"):
        bad_noise.push(torch.tensor([1]), final=True)


def test_unsuitable_reference_voice(dit: DiT, vocoder: Vocoder) -> None:
    stream = Detokenizer(dit, vocoder).start(silence(dit))
    bins = dit.config.mel_bins
    with pytest.raises(ValueError, match="found 0"):
        stream.prefill(torch.zeros(0, bins), torch.empty(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="1 to 3928 frames, found 4000"):
        stream.prefill(torch.zeros(4000, bins), torch.zeros(4000, dtype=torch.int64))
    with pytest.raises(ValueError, match="must be"):
        stream.prefill(torch.zeros(8, bins + 1), torch.zeros(8, dtype=torch.int64))
    with pytest.raises(ValueError, match="is outside"):
        stream.prefill(torch.zeros(8, bins), torch.full((8,), dit.config.codes))
