"""Samples, losses, gradients and optimizer steps against recorded ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import load_file

from kimia_infer.models.kimi_audio.language_model import causal_attention
from kimia_infer.training.dataset import join
from kimia_infer.training.model_files import write_model
from kimia_infer.training.network import TrainingNetwork, recompute_activations
from tests.paths import GOLDEN
from tests.training import recorded
from tests.training.recorded import RECORD, SAMPLES, SPECIAL

TENSORS = load_file(GOLDEN / "finetune" / "finetune.safetensors")
EVERY = pytest.mark.parametrize("index", range(len(SAMPLES)))


@pytest.fixture(scope="module")
def network() -> TrainingNetwork:
    return recorded.network()


@EVERY
def test_inputs_labels_and_masks(index: int):
    record = SAMPLES[index]
    sample = recorded.sample(record)
    columns = {
        "input_ids": sample.audio_ids,
        "text_input_ids": sample.text_ids,
        "is_continuous_mask": sample.is_continuous,
        "audio_labels": sample.audio_labels,
        "text_labels": sample.text_labels,
        "audio_loss_mask": sample.audio_loss_mask,
        "text_loss_mask": sample.text_loss_mask,
    }
    for name, found in columns.items():
        assert found.tolist() == torch.tensor(record[name]).flatten().tolist(), name
    assert sum(sample.segment_codes) == int(sample.is_continuous.sum())
    assert len(sample.mel) == len(sample.segment_codes) == record["n_features"]


@EVERY
def test_losses_and_gradients(network: TrainingNetwork, index: int):
    record = SAMPLES[index]
    network.zero_grad()
    losses = network(join([recorded.sample(record)], SPECIAL.pad, [1.0]))
    assert losses["audio"].item() == pytest.approx(record["audio_loss"], abs=1e-4)
    assert losses["text"].item() == pytest.approx(record["text_loss"], abs=1e-4)
    sum(losses.values()).sum().backward()
    gradients = recorded.published_gradients(network)
    assert gradients.keys() == record["grad_norms"].keys()
    for name, norm in record["grad_norms"].items():
        found = 0.0 if gradients[name] is None else gradients[name].norm().item()
        assert found == pytest.approx(norm or 0.0, rel=1e-3, abs=0.0), name
    prefix = f"{index}.grad."
    for name, expected in TENSORS.items():
        if name.startswith(prefix):
            found = gradients[name.removeprefix(prefix)]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * expected.norm().item())


@EVERY
@torch.no_grad()
def test_logits(network: TrainingNetwork, index: int):
    batch = join([recorded.sample(SAMPLES[index])], SPECIAL.pad, [1.0])
    model = network.language_model
    features = network.whisper_features(batch.mel, batch.segment_codes)
    x = model.embed(batch.audio_ids, batch.text_ids, batch.is_continuous, features)
    hidden = model(x, causal_attention(model.config))
    audio, text = model.audio_head(hidden.audio)[0], model.text_head(hidden.text)[0]
    torch.testing.assert_close(audio, TENSORS[f"{index}.audio_logits"], rtol=0, atol=1e-4)
    torch.testing.assert_close(text, TENSORS[f"{index}.text_logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("recompute", [False, True])
def test_adamw_steps(recompute: bool):
    network = recorded.network()
    if recompute:
        recompute_activations(network)
    settings = RECORD["adamw"]
    optimizer = torch.optim.AdamW(
        network.parameters(),
        lr=settings["lr"],
        betas=settings["betas"],
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
    )
    batch = join([recorded.sample(SAMPLES[0])], SPECIAL.pad, [1.0])
    for expected in settings["losses"]:
        loss = sum(network(batch).values()).sum()
        assert loss.item() == pytest.approx(expected, rel=1e-3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_a_checkpoint_with_whisper_has_the_published_names(tmp_path: Path):
    network, state = recorded.network(), PartialState(cpu=True)
    write_model(tmp_path, network, GOLDEN / "llm", recorded.components(), True, state)
    expected = json.loads((GOLDEN / "finetune" / "sft_state_dict_keys.json").read_text())
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors.keys() == set(expected)
    stored = load_file(GOLDEN / "llm" / "model.safetensors")
    for name in tensors.keys() & stored.keys():
        torch.testing.assert_close(tensors[name], stored[name], rtol=0, atol=0)
    with safe_open(GOLDEN / "whisper" / "model.safetensors", "pt") as before:
        after = load_file(tmp_path / "whisper-large-v3" / "model.safetensors")
        assert after
        for name, tensor in after.items():
            torch.testing.assert_close(tensor, before.get_tensor(name), rtol=0, atol=0)
