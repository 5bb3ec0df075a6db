"""The recorded tiny detokenizer and vocoder, laid out as a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kimia_infer.models.kimi_audio.config import VocoderConfig
from kimia_infer.models.kimi_audio.dit import DiT, dit_component
from kimia_infer.models.kimi_audio.vocoder import Vocoder, vocoder_component

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def checkpoint(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``audio_detokenizer`` and ``vocoder`` with the recorded files."""
    root = tmp_path_factory.mktemp("checkpoint")
    for folder, recorded, weights, config in (
        ("audio_detokenizer", "detok", "audio_detokenizer.safetensors", "config.yaml"),
        ("vocoder", "vocoder", "generator.safetensors", "config.json"),
    ):
        (root / folder).mkdir()
        (root / folder / "model.safetensors").symlink_to(golden / recorded / weights)
        (root / folder / config).symlink_to(golden / recorded / config)
    return root


@pytest.fixture(scope="session")
def dit(checkpoint: Path) -> DiT:
    return dit_component(checkpoint / "audio_detokenizer").load(CPU, torch.float32)


@pytest.fixture(scope="session")
def vocoder(checkpoint: Path) -> Vocoder:
    return vocoder_component(checkpoint / "vocoder").load(CPU, torch.float32)


@pytest.fixture(scope="session")
def small_vocoder(dit: DiT) -> Vocoder:
    """One stage of random weights: 8 samples per frame, whatever the shapes quickly computed."""
    config = VocoderConfig(
        mel_bins=dit.config.mel_bins,
        initial_channels=4,
        upsample_rates=(8,),
        upsample_kernel_sizes=(8,),
        resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((1,),),
        sample_rate=400,
    )
    vocoder, generator = Vocoder(config).requires_grad_(False), torch.Generator().manual_seed(0)
    for parameter in vocoder.parameters():
        parameter.normal_(std=0.1, generator=generator)
    return vocoder


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Thousands of tiny operations: on a busy machine every wait for a second thread is long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
