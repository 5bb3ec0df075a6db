"""The baseline of the speed comparison speaks as the library and as the recordings do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kimia_infer.models.kimi_audio.detokenizer import Detokenizer
from kimia_infer.models.kimi_audio.dit import dit_component
from kimia_infer.models.kimi_audio.vocoder import vocoder_component
from scripts.benchmark.plain_detokenizer import PlainDetokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def detokenizer(golden: Path) -> Detokenizer:
    checkpoint = golden / "e2e" / "checkpoint"
    return Detokenizer(
        dit_component(checkpoint / "audio_detokenizer").load(CPU, torch.float32),
        vocoder_component(checkpoint / "vocoder").load(CPU, torch.float32),
    )


def test_plain_wave(golden: Path, detokenizer: Detokenizer) -> None:
    """The recorded utterance of most codes, so that chunks overlap and see a past."""
    cases = json.loads((golden / "e2e" / "cases.json").read_text())["cases"]
    spoken = [case for case in cases if case.get("detokenizer_chunks")]
    case = max(spoken, key=lambda case: len(case["codes"]))
    assert len(case["detokenizer_chunks"]) > 1
    recorded = load_file(golden / "e2e" / "cases.safetensors")

    def noise(chunk: int, frames: int) -> torch.Tensor:
        return recorded[f"{case['name']}.noise.{chunk}"]

    codes = torch.tensor(case["codes"])
    wave = PlainDetokenizer(detokenizer).synthesize(codes, noise)
    torch.testing.assert_close(wave, detokenizer.synthesize(codes, noise), atol=1e-4, rtol=0)
    torch.testing.assert_close(wave[0], recorded[f"{case['name']}.wav"], atol=1e-4, rtol=0)


def test_linear_layers_of_the_library_are_not_used(
    golden: Path, detokenizer: Detokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be faster than plain ones; only their parameters are read."""

    def refuse(*arguments) -> None:
        raise AssertionError("a layer of the library was called")

    for layer in detokenizer.dit.modules():
        if isinstance(layer, nn.Linear):
            monkeypatch.setattr(layer, "forward", refuse)
    bins = detokenizer.dit.config.mel_bins
    codes = torch.zeros(2, dtype=torch.int64)
    wave = PlainDetokenizer(detokenizer).synthesize(codes, lambda _, n: torch.ones(n, bins))
    assert wave.shape == (1, 2 * detokenizer.samples_per_code)
