"""Adapters: trained alone, saved as peft does, and equal once they are added to the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from peft import PeftModel

from kimia_infer.training.adapters import lora_config
from kimia_infer.training.config import ADAPTED, AdapterConfig
from kimia_infer.training.dataset import Batch, join
from kimia_infer.training.model_files import trained_parameters, write_adapter
from kimia_infer.training.network import TrainingNetwork
from kimia_infer.utils.errors import ConfigurationError
from kimia_infer.weights.adapter import Adapter
from tests.training import recorded
from tests.training.recorded import SAMPLES, SPECIAL

SETTINGS = AdapterConfig(rank=4, dropout=0.0)
WITH_WHISPER = (*ADAPTED, "whisper")


@pytest.fixture(scope="module")
def batch() -> Batch:
    samples = [recorded.sample(record) for record in SAMPLES]
    return join(samples, SPECIAL.pad, [1.0] * len(samples))


def adapted(parts: tuple[str, ...] = WITH_WHISPER) -> TrainingNetwork:
    return recorded.network(parts, adapters=lora_config(SETTINGS, parts, "base"))


@pytest.fixture(scope="module")
def trained(batch: Batch) -> TrainingNetwork:
    network = adapted()
    optimizer = torch.optim.AdamW(trained_parameters(network).values(), lr=1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        sum(network(batch).values()).sum().backward()
        optimizer.step()
    return network


@pytest.fixture(scope="module")
def directory(trained: TrainingNetwork, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    config = lora_config(SETTINGS, WITH_WHISPER, "base")
    write_adapter(folder, trained, config, PartialState(cpu=True))
    return folder


def test_new_adapters_change_nothing(batch: Batch):
    torch.testing.assert_close(
        sum(adapted()(batch).values()), sum(recorded.network()(batch).values())
    )


@pytest.mark.parametrize(
    ("parts", "layers", "names"),
    [
        (("trunk",), ("attention",), {"qkv", "output"}),
        (("mimo",), ("feed_forward",), {"gate_up", "down"}),
        (("adaptor",), ("attention",), {"input", "output"}),
        (("heads",), ("attention",), {"text_head", "audio_head"}),
        (("whisper",), ("attention",), {"q_proj", "k_proj", "v_proj", "out_proj"}),
        (("whisper",), ("feed_forward",), {"fc1", "fc2"}),
    ],
)
def test_chosen_layers_are_adapted(parts: tuple, layers: tuple, names: set[str]):
    config = lora_config(AdapterConfig(layers=layers), parts, "base")
    network = recorded.network(parts, adapters=config)
    trained = trained_parameters(network)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trained} == names
    prefixes = {"trunk": "language_model.layers.", "mimo": "language_model.mimo_layers."}
    assert all(name.startswith(prefixes.get(parts[0], "")) for name in trained)


def test_only_linear_layers_can_be_adapted():
    with pytest.raises(ConfigurationError, match="parts: 'embedding' has no linear layers"):
        lora_config(SETTINGS, ["embedding"], "base")


def test_peft_reads_it(trained: TrainingNetwork, directory: Path, batch: Batch):
    network = PeftModel.from_pretrained(recorded.network(), directory)
    torch.testing.assert_close(sum(network(batch).values()), sum(trained(batch).values()))


def test_a_saved_adapter_gives_the_same_losses(
    trained: TrainingNetwork, directory: Path, batch: Batch
):
    expected = sum(trained(batch).values())
    network = recorded.network()
    assert not torch.allclose(expected, sum(network(batch).values()), rtol=0.05)
    adapter = Adapter.read(directory)
    assert (adapter.base, adapter.scale) == ("base", SETTINGS.alpha / SETTINGS.rank)
    parts = adapter.adapted(recorded.components())
    stages = {n: p.load(torch.device("cpu"), torch.float32) for n, p in parts.items()}
    served = TrainingNetwork(**stages, dtype=torch.float32)
    torch.testing.assert_close(sum(served(batch).values()), expected, rtol=1e-4, atol=1e-4)
