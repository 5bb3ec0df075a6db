"""The whole network against recorded values, and batches against rows alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kimia_infer.models.kokoro.checkpoint import load_network
from kimia_infer.models.kokoro.layers import Rows
from kimia_infer.models.kokoro.network import KokoroNetwork, Prosody, batch_of
from tests.models.kokoro.recorded import CPU, RECORDED

RAGGED = [list(range(1, 12)), [3, 1, 4, 1], [2, 7, 1, 8, 2, 8, 1]]


@pytest.fixture(scope="module")
def network(whole: Path) -> KokoroNetwork:
    return load_network(whole, CPU)


@pytest.fixture(scope="module")
def values() -> dict[str, Tensor]:
    return load_file(RECORDED / "whole.safetensors")


def prosody_of(network: KokoroNetwork, values: dict[str, Tensor], speed: float = 1) -> Prosody:
    return network.prosody(values["input_ids"], values["ref_s"], torch.tensor([speed]), Rows())


def test_prosody(network: KokoroNetwork, values: dict[str, Tensor]) -> None:
    found = prosody_of(network, values)
    assert found.durations.tolist() == [values["pred_dur"].tolist()]
    torch.testing.assert_close(found.pitch, values["F0"], atol=1e-3, rtol=0)
    torch.testing.assert_close(found.energy, values["N"], atol=1e-4, rtol=0)
    torch.testing.assert_close(found.text.mT, values["asr"], atol=1e-5, rtol=0)


def test_speed_divides_durations(network: KokoroNetwork, values: dict[str, Tensor]) -> None:
    found = prosody_of(network, values, speed=0.5)
    assert found.durations.tolist() == [values["speed0.5.pred_dur"].tolist()]


def test_wave(network: KokoroNetwork, values: dict[str, Tensor]) -> None:
    """From the recorded pitch: the source turns its last bits into jumps of an angle."""
    found = prosody_of(network, values)
    exact = Prosody(found.durations, found.text, values["F0"], found.energy, found.rows)
    (wave,) = network.waves(exact, values["ref_s"])
    torch.testing.assert_close(wave, values["audio"], atol=1e-4, rtol=0)


def test_rows_of_a_batch_are_as_alone(network: KokoroNetwork) -> None:
    """Every length of three; the waves are made from the same pitch, to its last bit."""
    style = torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
    ids, rows = batch_of(RAGGED, CPU)
    speed = torch.tensor([1.0, 0.8, 1.3])
    together = network.prosody(ids, style, speed, rows)
    noise = torch.randn(24_000, 9, generator=torch.Generator().manual_seed(2))
    waves = network.waves(together, style, lambda row, samples: noise[row : row + samples])
    assert together.rows.lengths is not None
    lengths = together.rows.lengths.tolist()
    assert len(set(lengths)) == 3
    for row, symbols in enumerate(RAGGED):
        one = slice(row, row + 1)
        alone = network.prosody(*batch_of([symbols], CPU)[:1], style[one], speed[one], Rows())
        size, frames = len(symbols) + 2, lengths[row]
        assert torch.equal(alone.durations, together.durations[one, :size])
        assert not together.durations[row, size:].any()
        for name, tolerance in (("text", 1e-5), ("pitch", 1e-3), ("energy", 3e-5)):
            batched, single = getattr(together, name)[one], getattr(alone, name)
            torch.testing.assert_close(
                batched[:, : single.shape[1]], single, atol=tolerance, rtol=0
            )
            assert not batched[:, single.shape[1] :].any()
        alone.pitch.copy_(together.pitch[one, : 2 * frames])
        (wave,) = network.waves(alone, style[one], lambda _, n, row=row: noise[row : row + n])
        torch.testing.assert_close(waves[row], wave, atol=1e-5, rtol=0)


def test_bfloat16_changes_no_duration(
    network: KokoroNetwork, whole: Path, values: dict[str, Tensor]
) -> None:
    exact = prosody_of(network, values)
    (expected,) = network.waves(exact, values["ref_s"])
    rough = load_network(whole, CPU, torch.bfloat16)
    found = prosody_of(rough, values)
    assert torch.equal(found.durations, exact.durations)
    (wave,) = rough.waves(exact, values["ref_s"])
    assert wave.dtype is torch.float32 and wave.shape == expected.shape
    assert (wave - expected).abs().mean() < 0.5 * expected.abs().mean()
