"""The recorded tiny language model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kimia_infer.models.kimi_audio.language_model import LanguageModel, language_model_component


@pytest.fixture(scope="session")
def recorded(golden: Path) -> dict[str, torch.Tensor]:
    return load_file(golden / "llm" / "forward.safetensors")


@pytest.fixture(scope="session")
def model(golden: Path) -> LanguageModel:
    return language_model_component(golden / "llm").load(torch.device("cpu"), torch.float32)


@pytest.fixture(scope="session")
def features(recorded: dict[str, torch.Tensor]) -> torch.Tensor:
    """The Whisper features of all recorded audio spans, in order."""
    names = sorted(n for n in recorded if n.startswith("prefill.whisper_feature."))
    return torch.cat([recorded[name] for name in names])
