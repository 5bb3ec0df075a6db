"""The lengths by which samples are grouped are those they have."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from kimia_infer.training.dataset import Batch
from kimia_infer.training.network import TrainingNetwork
from kimia_infer.training.tasks.finetune import finetune, read_data
from tests.paths import MINI
from tests.training.runs import settings, write_data

FROZEN = "parts=[embedding, trunk, mimo, adaptor, heads]"  # Whisper takes most of the time


def test_lengths_are_known_before_samples_are_built(tmp_path: Path):
    run = settings(write_data(tmp_path), tmp_path / "run", "eval_ratio=0.2")
    samples, held_out = read_data(run, MINI)
    for some in (samples, held_out):
        built = [len(some.builder.build(some.file[line])) for line in some.items]
        assert list(some.lengths) == built
    assert len(set(samples.lengths)) > 1


def test_a_run_can_group_by_length(tmp_path: Path):
    batches: list[Batch] = []

    def watch(module: torch.nn.Module, arguments: tuple) -> None:
        if isinstance(module, TrainingNetwork):
            batches.append(arguments[0])

    options = ("group_by_length=true", "eval_ratio=0", "max_steps=3", FROZEN)
    config = settings(write_data(tmp_path, lines=6), tmp_path / "run", *options)
    with register_module_forward_pre_hook(watch):
        assert finetune(config).complete
    samples, _ = read_data(config, MINI)
    ordered = sorted(samples.lengths)
    expected = [max(ordered[place : place + 2]) for place in range(0, 6, 2)]
    assert sorted(batch.text_ids.shape[1] for batch in batches) == expected
    for batch in batches:
        sizes = (batch.text_ids != samples.builder.special.pad).sum(1)
        assert sizes.max() == batch.text_ids.shape[1]
