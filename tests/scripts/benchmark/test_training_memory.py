"""Memory is counted without values as it is with them, and as arithmetic says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from kimia_infer.models.kimi_audio.config import encoder_config
from kimia_infer.models.kimi_audio.language_model import LanguageModel
from kimia_infer.training.adapters import lora_config
from kimia_infer.training.config import AdapterConfig
from kimia_infer.training.model_files import plan_training
from kimia_infer.training.network import TrainingNetwork
from kimia_infer.weights.component import read_json
from scripts.benchmark.sizes import PUBLISHED, Sizes
from scripts.benchmark.training_memory import Plan, count_memory, make_batch, measure
from tests.paths import GOLDEN
from tests.training import recorded

PATH = GOLDEN / "whisper" / "config.json"
SIZES = replace(
    PUBLISHED,
    whisper=encoder_config(read_json(PATH), PATH),
    language_model=replace(recorded.CONFIG, intermediate_size=128),
)


def real(plan: Plan, sizes: Sizes) -> TrainingNetwork:
    """As :func:`count_memory` plans it, with values."""
    with torch.device("meta"):
        model = LanguageModel(sizes.language_model)
        whisper = recorded.components()["whisper"].build()
        network = TrainingNetwork(model, whisper, torch.float32)
    adapters = None
    if plan.method == "lora":
        adapters = lora_config(AdapterConfig(rank=plan.rank), plan.parts, "")
    plan_training(network, plan.parts, adapters, plan.recompute, False)
    network.to_empty(device="cpu")
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.02)
    return network


@pytest.mark.parametrize(
    "plan",
    [Plan("lora", 2, 64), Plan("lora", 1, 96, recompute=False), Plan("full", 2, 48)],
    ids=["lora", "keeping", "full"],
)
def test_values_make_no_difference(plan: Plan):
    found = count_memory(plan, SIZES, torch.float32)
    assert found == measure(real(plan, SIZES), make_batch(plan, SIZES))


def test_it_is_the_sum_of_its_parts():
    plan = Plan("full", 1, 48, parts=("mimo",))
    found = count_memory(plan, SIZES, torch.bfloat16)
    network = real(plan, SIZES)
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in network.parameters() if not p.requires_grad)
    assert found.weights == 4 * trained + 2 * frozen
    assert found.optimizer == 8 * trained
    assert found.peak > found.weights + found.optimizer + 4 * trained


def test_more_positions_and_kept_activations_take_more():
    plan = Plan("lora", 1, 256)
    changes = ({"length": 512}, {"batch_size": 2}, {"recompute": False})
    larger = [count_memory(replace(plan, **change), SIZES).peak for change in changes]
    assert min(larger) > count_memory(plan, SIZES).peak


def test_four_bits_are_counted_as_such():
    plain, quantized = (count_memory(Plan(method, 1, 48), SIZES) for method in ("lora", "qlora"))
    config = SIZES.language_model
    rows = (config.heads + 2 * config.kv_heads) * config.head_dim + config.hidden_size
    layer = config.hidden_size * (rows + 3 * config.intermediate_size)
    values = layer * (config.trunk_layers + config.mimo_layers)
    assert plain.weights - quantized.weights == values * (16 - 4.5) / 8
    assert plain.optimizer == quantized.optimizer
