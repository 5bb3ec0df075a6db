"""Frozen matrices in 4 bits: small, near what they were, and adapters on them are served."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from torch import nn

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.models.kimi_audio.components import understanding_components
from kimia_infer.training.adapters import lora_config
from kimia_infer.training.config import ADAPTED, AdapterConfig
from kimia_infer.training.model_files import Components, build_network, trained_parameters
from kimia_infer.training.network import TrainingNetwork
from kimia_infer.training.quantized import QuantizedLinear
from kimia_infer.training.run_directory import FINAL
from kimia_infer.training.tasks.finetune import finetune
from kimia_infer.utils.errors import ConfigurationError
from tests.paths import MINI
from tests.training import recorded, runs


def build(source: Components, quantized: bool) -> TrainingNetwork:
    config = lora_config(AdapterConfig(), ADAPTED, "base")
    return build_network(
        source, PartialState(cpu=True), torch.float32, ADAPTED, config, quantized=quantized
    )


@pytest.fixture(scope="module")
def networks() -> tuple[TrainingNetwork, TrainingNetwork]:
    """Plain and quantized."""
    source = understanding_components(MINI)
    return build(source, False), build(source, True)


def test_the_decoder_is_held_in_four_and_a_half_bits(networks):
    layers = [m for m in networks[1].modules() if isinstance(m, QuantizedLinear)]
    config = networks[1].language_model.config
    assert len(layers) == 4 * (config.trunk_layers + config.mimo_layers)
    for layer in layers:
        weight, state = layer.weight, layer.weight.quant_state
        values = layer.in_features * layer.out_features
        assert weight.nbytes == values // 2
        assert 8 * (weight.nbytes + state.absmax.nbytes) / values == 4.5
        assert not weight.requires_grad


def test_everything_else_stays_as_it_is(networks):
    plain, quantized = (dict(network.named_parameters()) for network in networks)
    decoder = ("language_model.layers.", "language_model.mimo_layers.")
    assert plain.keys() == quantized.keys()
    for name, parameter in plain.items():
        matrix = parameter.ndim == 2 and ".lora_" not in name and name.startswith(decoder)
        if not matrix:
            assert torch.equal(quantized[name], parameter), name
    assert trained_parameters(networks[0]).keys() == trained_parameters(networks[1]).keys()


@torch.no_grad()
def test_it_computes_nearly_the_same(networks):
    """The error of 4-bit normal floats is about a tenth of normal values."""
    names = [n for n, m in networks[1].named_modules() if isinstance(m, QuantizedLinear)]
    for name in names:
        plain, quantized = (network.get_submodule(name) for network in networks)
        assert isinstance(plain, nn.Linear)
        x = torch.randn(3, 5, plain.in_features)
        expected, found = plain(x), quantized(x)
        assert 0 < (found - expected).norm() / expected.norm() < 0.15


def test_nothing_is_allocated_before_it_is_read(monkeypatch):
    """Matrices are filled one by one; while one is, the later ones have no values."""
    filled: list[bool] = []
    fill, source = QuantizedLinear.fill, understanding_components(MINI)
    networks: list[nn.Module] = []
    adapted = TrainingNetwork.requires_grad_

    def noted(self, *arguments):
        networks.append(self)
        return adapted(self, *arguments)

    def watched(self, value, device):
        layers = [m for m in networks[0].modules() if isinstance(m, QuantizedLinear)]
        assert sum(m.weight.numel() > 0 for m in layers) == len(filled)
        filled.append(True)
        fill(self, value, device)

    monkeypatch.setattr(TrainingNetwork, "requires_grad_", noted)
    monkeypatch.setattr(QuantizedLinear, "fill", watched)
    build(source, True)
    assert len(filled) > 8


def test_rows_have_to_be_whole_blocks():
    assert recorded.CONFIG.intermediate_size % 64
    with pytest.raises(ConfigurationError, match=r"^method: qlora .* rows of \d+; use lora"):
        build(recorded.components(), True)


def test_the_adapter_is_served_on_the_plain_base(tmp_path: Path):
    data = runs.write_data(tmp_path)
    options = ("method=qlora", "max_steps=2", "learning_rate=5e-2")
    finetune(runs.settings(data, tmp_path / "run", *options))
    sound = runs.write_sound(tmp_path / "question.wav", 1.0, 7)
    chats = [{"role": "user", "message_type": "audio", "content": str(sound)}]
    texts = [
        KimiAudio(str(MINI), load_detokenizer=False, device="cpu", adapter=adapter).generate(
            chats, max_new_tokens=12
        )[1]
        for adapter in (None, tmp_path / "run" / FINAL)
    ]
    assert texts[0] != texts[1]
