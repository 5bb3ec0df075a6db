"""The published model on a CUDA device that is not there, loaded once for all tests here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.loading import load_components
from kimia_infer.layers import quantization
from kimia_infer.models.kimi_audio import detokenizer, flow
from kimia_infer.models.kimi_audio.detokenizer import vocoded_frames
from kimia_infer.models.kimi_audio.encoders import SEGMENT_FRAMES, SpeechCodes
from kimia_infer.models.kimi_audio.flow import StreamConfig
from tests.rehearsal.fake_cuda import CUDA, FakeCuda
from tests.rehearsal.published import SECONDS, WAVE, Loaded, NoFeatures, fields_of, write_checkpoint


@pytest.fixture(scope="package")
def patch(long: bool) -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantization, "BLOCK_VALUES", 2**28)  # a matrix at once
        if not long:  # the operations of a network are the same for all lengths
            frames = vocoded_frames(StreamConfig())
            patch.setattr(SpeechCodes, "lengths", (SECONDS * 100, SEGMENT_FRAMES))
            patch.setattr(flow, "KEYS_STEP", 10**6)  # the past is read up to its capacity
            patch.setattr(detokenizer, "vocoded_frames", lambda config: [frames[0], frames[-1]])
        yield patch


@pytest.fixture(scope="package")
def card(patch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(patch)


@pytest.fixture(scope="package")
def directory(tmp_path_factory: pytest.TempPathFactory, long: bool) -> Path:
    directory = tmp_path_factory.mktemp("published")
    write_checkpoint(directory, fields_of(long))
    return directory


@pytest.fixture(scope="package")
def loaded(card: FakeCuda, directory: Path) -> Loaded:
    with card.active() as ledger, ledger.peak_within() as peak:
        components = load_components(directory, True, CUDA, torch.bfloat16, slots=2)
        model = KimiAudio.from_components(components)
    return Loaded(components, model, peak[0])


@pytest.fixture(scope="package")
def features(card: FakeCuda, loaded: Loaded) -> Tensor:
    """Whisper features of the question."""
    model = loaded.model
    for encoder in (model.whisper_features, model.speech_codes):
        encoder.extractor = NoFeatures()
    with card.active():
        return model.whisper_features.encode(WAVE)
