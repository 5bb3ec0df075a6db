"""Flow and vocoder against recordings of the published ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kimia_infer.models.step_audio_editx import hift, packing
from kimia_infer.models.step_audio_editx.config import FlowConfig, VocoderConfig
from kimia_infer.models.step_audio_editx.flow import Flow
from kimia_infer.weights.component import Component
from kimia_infer.weights.tensors import open_safetensors
from tests.models.step_audio_editx.recorded import RECORDED, sizes, tensors

GOLDEN = tensors("flow_golden")


@pytest.fixture(scope="module")
def flow() -> Flow:
    network = Flow(FlowConfig.model_validate(sizes()["flow"]))
    network.load_state_dict({name: t.float() for name, t in tensors("flow").items()})
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def vocoder() -> hift.Vocoder:
    config = VocoderConfig.model_validate(sizes()["hift"])
    store = open_safetensors([RECORDED / "hift.safetensors"])
    slots = hift.vocoder_slots(hift.Vocoder(config), store)
    part = Component("vocoder", lambda: hift.Vocoder(config), slots, store, ignored=())
    return part.load(torch.device("cpu"), torch.float32)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def test_rows_are_the_recorded_ones() -> None:
    prompt = GOLDEN["prompt_tokens"].tolist()
    close(packing.flow_rows(prompt), GOLDEN["prompt_rows"])
    close(packing.aligned_mel(GOLDEN["prompt_mel"], 24), GOLDEN["prompt_feat"])


def test_flow_is_the_recorded_one(flow: Flow) -> None:
    rows = torch.cat([GOLDEN["prompt_rows"], GOLDEN["rows"]])
    embedded = flow.input_embedding(rows)
    close(embedded, GOLDEN["embedded"], 0)
    close(flow.encoder(embedded[None])[0], GOLDEN["encoder_out"])
    noise = GOLDEN["rand_noise"].float().T[: 2 * len(rows)]
    given = (GOLDEN[name] for name in ("rows", "prompt_rows", "prompt_feat", "spk"))
    close(flow(*given, noise), GOLDEN["mel"].T)


def test_vocoder_is_the_recorded_one(vocoder: hift.Vocoder) -> None:
    mel, noise = GOLDEN["mel"], GOLDEN["source_noise"].float()
    pitch = vocoder.f0_predictor(mel[None])[0]
    close(pitch, GOLDEN["f0"], 2e-4)  # in Hz, of 400
    close(vocoder.m_source(GOLDEN["f0"][None], noise[None])[0], GOLDEN["source"])
    close(vocoder.decode(mel[None], GOLDEN["source"][None])[0], GOLDEN["wave"])


def test_the_whole_vocoder_gives_the_recorded_wave(vocoder: hift.Vocoder) -> None:
    """Folding weight norm rounds the pitch, in its last place, otherwise: a phase of 0.002."""
    close(vocoder(GOLDEN["mel"].T, GOLDEN["source_noise"].float()), GOLDEN["wave"], 4e-3)
    close(vocoder(GOLDEN["mel"].T, None), GOLDEN["wave_no_noise"], 4e-3)
