"""Whole runs on the miniature: they learn, continue, stop cleanly, and give what can be served."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.data.conversations import DataError
from kimia_infer.training.run_directory import BOARD, FINAL, PLOT, TrainingError, all_checkpoints
from kimia_infer.training.tasks.finetune import finetune
from kimia_infer.utils.errors import ConfigurationError
from tests.command_line import run_here
from tests.paths import MINI
from tests.training import runs
from tests.training.runs import before_step, interrupt, losses

ROOT = MINI.parents[1]
FINETUNE = ROOT / "scripts" / "finetune"
FULL = "parts=[embedding, trunk, mimo, adaptor, heads]"  # Whisper takes most of the time


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return runs.write_data(tmp_path_factory.mktemp("data"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = [p for p in folder.glob("*.safetensors")]
    return load_file(path)


@pytest.mark.parametrize("method", [FULL, "method=lora"], ids=["full", "lora"])
def test_a_run_learns(data: Path, tmp_path: Path, method: str):
    rate = 2e-3 if method == FULL else 2e-2
    settings = runs.settings(
        data, tmp_path, method, "max_steps=20", f"learning_rate={rate}", "eval_every=10",
        f"feature_cache={tmp_path / 'features'}",
    )  # fmt: skip
    result = finetune(settings)
    assert result.complete
    found = losses(result, "text_loss")
    assert len(found) == 20
    assert sum(found[-3:]) < 0.6 * sum(found[:3])
    assert len(losses(result, "eval_loss")) == 2
    assert (tmp_path / PLOT).stat().st_size > 1_000
    assert list((tmp_path / BOARD).iterdir())


@pytest.mark.parametrize("method", [FULL, "method=qlora"], ids=["full", "qlora"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    data: Path, tmp_path: Path, untrained: Path, method: str
):
    options = [method, "max_steps=5", "save_every=2", "accumulation=2", "batch_size=1"]
    options.append(f"model={untrained}")
    whole = finetune(runs.settings(data, tmp_path / "whole", *options))
    settings = runs.settings(data, tmp_path / "parts", *options)
    interrupt(lambda: finetune(settings), step=3)
    assert [path.name for path in all_checkpoints(tmp_path / "parts")] == ["step-00000002"]
    resumed = finetune(settings, resume=True)
    assert losses(resumed) == losses(whole)
    assert losses(resumed, "eval_loss") == losses(whole, "eval_loss")
    expected, found = weights(tmp_path / "whole" / FINAL), weights(tmp_path / "parts" / FINAL)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_full_run_gives_a_model_that_is_served(data: Path, tmp_path: Path):
    settings = runs.settings(data, tmp_path, "max_steps=2", "save_every=1", "keep_checkpoints=1")
    result = finetune(settings)
    assert all_checkpoints(tmp_path) == [result.checkpoint]
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith(".part")]
    model = KimiAudio(str(tmp_path / FINAL), device="cpu")
    chats = [{"role": "user", "message_type": "audio", "content": str(data.parent / "0.wav")}]
    wav, text = model.generate(chats, output_type="text", max_new_tokens=3)
    assert wav is None
    assert isinstance(text, str)
    before, after = weights(MINI), weights(tmp_path / FINAL)
    assert before.keys() <= after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "model.layers.0.mlp.up_proj.weight" in changed
    encoder = "whisper-large-v3"
    name = "model.encoder.conv1.weight"
    whisper = weights(tmp_path / FINAL / encoder)[name]
    assert not torch.equal(whisper, weights(MINI / encoder)[name])
    torch.testing.assert_close(
        whisper, after["whisper_model.speech_encoder.conv1.weight"], rtol=0, atol=0
    )


def test_frozen_parts_do_not_change(data: Path, tmp_path: Path):
    finetune(runs.settings(data, tmp_path, "max_steps=1", "parts=[mimo, adaptor]"))
    before, after = weights(MINI), weights(tmp_path / FINAL)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    parts = ("model.mimo_layers.", "model.vq_adaptor.")
    assert all(any(name.startswith(part) for name in changed) for part in parts)
    assert all(name.startswith((*parts, "model.mimo_norm.")) for name in changed)
    assert before.keys() == after.keys()


def test_a_signal_ends_the_run_after_a_checkpoint(data: Path, tmp_path: Path, untrained: Path):
    settings = runs.settings(data, tmp_path, f"model={untrained}", "max_steps=4", "method=lora")
    before = signal.getsignal(signal.SIGTERM)
    with before_step(2, lambda _: os.kill(os.getpid(), signal.SIGTERM)):
        stopped = finetune(settings)
    assert signal.getsignal(signal.SIGTERM) is before
    assert (stopped.step, stopped.complete) == (3, False)
    assert not (tmp_path / FINAL).exists()
    resumed = finetune(settings, resume=True)
    assert resumed.complete
    assert len(losses(resumed)) == 4


def test_a_loss_that_is_not_finite_stops_the_run(data: Path, tmp_path: Path, untrained: Path):
    def spoil(optimizer: torch.optim.Optimizer) -> None:
        optimizer.param_groups[0]["params"][0].grad.fill_(math.nan)

    options = [f"model={untrained}", FULL, "max_steps=4", "save_every=1", "eval_ratio=0"]
    config = runs.settings(data, tmp_path, *options)
    with before_step(2, spoil), pytest.raises(TrainingError) as caught:
        finetune(config)
    message = str(caught.value)
    assert "step 3: the loss is nan with the samples" in message
    assert f"{data}:" in message
    assert str(all_checkpoints(tmp_path)[-1]) in message
    assert all_checkpoints(tmp_path)[-1].name == "step-00000002"


def test_runs_are_not_mixed(data: Path, tmp_path: Path):
    settings = runs.settings(data, tmp_path, "max_steps=1", "method=lora")
    with pytest.raises(ConfigurationError, match="no checkpoint to resume from"):
        finetune(settings, resume=True)
    finetune(settings)
    with pytest.raises(ConfigurationError, match="--resume"):
        finetune(settings)
    other = runs.settings(data, tmp_path, "max_steps=1", "method=lora", "seed=5")
    with pytest.raises(ConfigurationError, match=r"^seed: 5, but .* was trained with 0"):
        finetune(other, resume=True)
    other = runs.settings(data, tmp_path, "max_steps=1", "method=lora", "batch_size=1")
    with pytest.raises(TrainingError, match=r"2 samples per step, here 1"):
        finetune(other, resume=True)
    assert finetune(settings, resume=True).step == 1


def test_bad_data_stops_before_training(data: Path, tmp_path: Path):
    bad = data.with_name("bad.jsonl")
    lines = data.read_text().splitlines()
    broken = json.loads(lines[1])
    broken["conversation"][1]["content"] = "nowhere.wav"
    bad.write_text("\n".join([lines[0], json.dumps(broken), *lines[2:]]) + "\n")
    with pytest.raises(DataError, match=rf"{bad}:2: conversation\[1\].content: "):
        finetune(runs.settings(bad, tmp_path))
    assert not list(tmp_path.iterdir())
    result = finetune(runs.settings(bad, tmp_path, "bad_lines=skip", "max_steps=1", "method=lora"))
    assert result.complete
    with pytest.raises(ConfigurationError, match="parts: 'embedding'"):
        finetune(runs.settings(data, tmp_path / "x", "method=lora", "parts=[embedding]"))


def test_the_command_names_what_is_wrong(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    known = runs.assignments_of(data, tmp_path)
    for arguments, message in {
        ("epoch=3",): "epoch: unknown field; did you mean epochs?",
        (str(tmp_path / "none.yaml"),): "none.yaml: cannot be read",
        ("a.yaml", "b.yaml"): "more than one settings file",
    }.items():
        assert run_here("finetune", *known, *arguments) in (1, 2)
        assert message in capsys.readouterr().err


def test_two_processes_agree_with_one(data: Path, tmp_path: Path, long: bool):
    """Parameters and batches are divided, by FSDP over gloo; one can go on from two."""
    if not long:
        pytest.skip("starting processes takes twenty seconds; run with --long")
    options = (
        "max_steps=3",
        "accumulation=2",
        "gradient_checkpointing=true",
        "save_every=2",
        "eval_every=1",
    )
    one = finetune(runs.settings(data, tmp_path / "one", "batch_size=2", *options))
    assignments = runs.assignments_of(data, tmp_path / "two", "batch_size=1", *options)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", FINETUNE]
    done = subprocess.run(
        [sys.executable, *launch, *assignments],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    path = tmp_path / "two" / "metrics.jsonl"
    two = [json.loads(line) for line in path.read_text().splitlines()]
    for expected, found in zip(one.metrics, two, strict=True):
        for name in expected.keys() - {"seconds"}:
            assert found[name] == pytest.approx(expected[name], rel=1e-4), name
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-00000003")
    resumed = finetune(runs.settings(data, tmp_path / "two", "batch_size=2", *options), resume=True)
    assert losses(resumed) == pytest.approx(losses(one), rel=1e-4)
    expected, found = weights(tmp_path / "one" / FINAL), weights(tmp_path / "two" / FINAL)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0.02, atol=2e-3)
