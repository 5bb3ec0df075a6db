"""Adapters: trained alone, saved as peft does, and equal whether applied or merged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from peft import PeftModel
from safetensors.torch import load_file, save_file

from kimia_infer.training.adapters import (
    WEIGHTS_NAME,
    apply_adapter,
    load_adapters,
    lora_config,
    merge_adapters,
)
from kimia_infer.training.batch import Batch, join
from kimia_infer.training.building import trained_parameters
from kimia_infer.training.config import LORA_PARTS, ConfigError, LoraSettings
from kimia_infer.training.network import TrainingNetwork
from kimia_infer.training.servable import write_adapter
from kimia_infer.weights.checkpoint import CheckpointError
from tests.training import recorded
from tests.training.recorded import SAMPLES, SPECIAL

SETTINGS = LoraSettings(rank=4, dropout=0.0)
WITH_WHISPER = (*LORA_PARTS, "whisper")


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
        network(batch).total.sum().backward()
        optimizer.step()
    return network


@pytest.fixture(scope="module")
def directory(trained: TrainingNetwork, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    config = lora_config(SETTINGS, WITH_WHISPER, "base")
    write_adapter(folder, trained, config, PartialState(cpu=True))
    return folder


def test_new_adapters_change_nothing(batch: Batch):
    torch.testing.assert_close(adapted()(batch).total, recorded.network()(batch).total)


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
    config = lora_config(LoraSettings(layers=layers), parts, "base")
    network = recorded.network(parts, adapters=config)
    trained = trained_parameters(network)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trained} == names
    prefixes = {"trunk": "language_model.layers.", "mimo": "language_model.mimo_layers."}
    assert all(name.startswith(prefixes.get(parts[0], "")) for name in trained)


def test_only_linear_layers_can_be_adapted():
    with pytest.raises(ConfigError, match="parts: 'embedding' has no linear layers"):
        lora_config(SETTINGS, ["embedding"], "base")


def test_a_saved_adapter_gives_the_same_losses(
    trained: TrainingNetwork, directory: Path, batch: Batch
):
    expected = trained(batch).total
    assert not torch.allclose(expected, recorded.network()(batch).total, rtol=0.05)
    network = recorded.network()
    load_adapters(network, directory)
    torch.testing.assert_close(network(batch).total, expected)
    merge_adapters(network)
    assert not [name for name, _ in network.named_parameters() if "lora" in name]
    torch.testing.assert_close(network(batch).total, expected, rtol=1e-4, atol=1e-4)


def test_peft_reads_it(trained: TrainingNetwork, directory: Path, batch: Batch):
    network = PeftModel.from_pretrained(recorded.network(), directory)
    torch.testing.assert_close(network(batch).total, trained(batch).total)


def test_an_adapter_is_applied_to_served_stages(
    trained: TrainingNetwork, directory: Path, batch: Batch
):
    base = recorded.network()
    apply_adapter(directory, base.language_model, base.whisper)
    torch.testing.assert_close(base(batch).total, trained(batch).total, rtol=1e-4, atol=1e-4)


def test_an_adapter_of_another_model_is_refused(directory: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match="file missing"):
        load_adapters(recorded.network(), tmp_path)
    tensors = load_file(directory / WEIGHTS_NAME)
    name = next(iter(tensors))
    for path in directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    save_file({**tensors, name: torch.zeros(3, 3)}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(CheckpointError, match="has shape"):
        load_adapters(recorded.network(), tmp_path)
    save_file({n: t for n, t in tensors.items() if n != name}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(CheckpointError, match="is missing"):
        load_adapters(recorded.network(), tmp_path)
