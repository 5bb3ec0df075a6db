"""The real weights, from packages, against values recorded with the published implementation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kimia_infer.models.kokoro.checkpoint import load_network
from kimia_infer.models.kokoro.layers import Rows
from kimia_infer.models.kokoro.network import KokoroNetwork, Prosody, batch_of
from kimia_infer.models.kokoro.voices import Voices
from tests.models.kokoro.recorded import CPU, RECORDED, log_mel

CASES = tuple(json.loads((RECORDED / "real.json").read_text())["cases"])


@pytest.fixture(scope="module")
def network(real: Path) -> KokoroNetwork:
    return load_network(real, CPU)


@pytest.fixture(scope="module")
def values() -> dict[str, Tensor]:
    return load_file(RECORDED / "real.safetensors")


def prosody_of(network: KokoroNetwork, values: dict[str, Tensor], case: str) -> Prosody:
    ids, style = values[f"{case}.input_ids"].view(1, -1), values[f"{case}.ref_s"].view(1, -1)
    return network.prosody(ids.long(), style.float(), torch.ones(1), Rows())


@pytest.mark.parametrize("case", CASES)
def test_recorded_sentence(network: KokoroNetwork, values: dict[str, Tensor], case: str) -> None:
    found = prosody_of(network, values, case)
    pitch, energy = values[f"{case}.F0"].view(1, -1), values[f"{case}.N"].view(1, -1)
    assert found.durations[0].tolist() == values[f"{case}.pred_dur"].view(-1).tolist()
    torch.testing.assert_close(found.pitch, pitch, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found.energy, energy, atol=1e-3, rtol=0)
    style, expected = values[f"{case}.ref_s"].view(1, -1).float(), values[f"{case}.logmel"]
    (wave,) = network.waves(found, style)
    assert (log_mel(wave) - expected).abs().mean() < 0.02
    exact = Prosody(found.durations, found.text, pitch, energy, found.rows)
    (wave,) = network.waves(exact, style)
    assert (log_mel(wave) - expected).abs().mean() < 1e-3


def test_a_batch_sounds_as_its_rows_alone(
    network: KokoroNetwork, values: dict[str, Tensor]
) -> None:
    cases = ("sum.af_heart", "hello.af_heart")
    utterances = [values[f"{c}.input_ids"].view(-1)[1:-1].tolist() for c in cases]
    style = torch.stack([values[f"{c}.ref_s"].view(-1).float() for c in cases])
    ids, rows = batch_of(utterances, CPU)
    together = network.prosody(ids, style, torch.ones(2), rows)
    waves = network.waves(together, style)
    for row, case in enumerate(cases):
        alone = prosody_of(network, values, case)
        frames = alone.pitch.shape[1]
        torch.testing.assert_close(together.pitch[row, :frames], alone.pitch[0], atol=1e-3, rtol=0)
        alone.pitch.copy_(together.pitch[row : row + 1, :frames])
        (wave,) = network.waves(alone, style[row : row + 1])
        assert (log_mel(waves[row]) - log_mel(wave)).abs().mean() < 1e-3


def test_voices_of_the_packages(real: Path, values: dict[str, Tensor]) -> None:
    voices = Voices(real, 256)
    assert {"af_heart", "am_michael"} <= set(voices.names)
    row = json.loads((RECORDED / "real.json").read_text())["cases"]["fox.af_heart"]["voice_row"]
    recorded = values["fox.af_heart.ref_s"].view(-1).float()
    assert torch.equal(voices.style("af_heart", row + 1), recorded)


def test_bfloat16_sounds_nearly_the_same(real: Path, values: dict[str, Tensor]) -> None:
    rough = load_network(real, CPU, torch.bfloat16)
    found = prosody_of(rough, values, "sum.af_heart")
    (wave,) = rough.waves(found, values["sum.af_heart.ref_s"].view(1, -1).float())
    assert (log_mel(wave) - values["sum.af_heart.logmel"]).abs().mean() < 0.15
