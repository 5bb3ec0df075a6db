"""The lengths by which samples are grouped are those they have."""

from __future__ import annotations

from pathlib import Path

from pytest import MonkeyPatch

from kimia_infer.training.tasks import finetune as module
from kimia_infer.training.trainer import Trainer
from tests.paths import MINI
from tests.training.runs import settings, write_data


def test_lengths_are_known_before_samples_are_built(tmp_path: Path):
    run = settings(write_data(tmp_path), tmp_path / "run", "eval_ratio=0.2")
    samples, held_out = module.read_data(run, MINI)
    for some in (samples, held_out):
        built = [len(some.builder.build(some.file[line])) for line in some.lines]
        assert list(some.lengths) == built
    assert len(set(samples.lengths)) > 1


def test_a_run_can_group_by_length(tmp_path: Path, monkeypatch: MonkeyPatch):
    widths: list[tuple[int, list[int]]] = []
    batches = Trainer._batches

    def watch(self, samples, plan, *rest):
        for batch in batches(self, samples, plan, *rest):
            sizes = (batch.text_ids != samples.builder.special.pad).sum(1).tolist()
            widths.append((batch.text_ids.shape[1], sizes))
            yield batch

    monkeypatch.setattr(Trainer, "_batches", watch)
    options = ("group_by_length=true", "eval_ratio=0", "max_steps=3")
    data = write_data(tmp_path, lines=6)
    assert module.finetune(settings(data, tmp_path / "run", *options)).complete
    samples, _ = module.read_data(settings(data, tmp_path / "run", *options), MINI)
    ordered = sorted(samples.lengths)
    expected = [max(ordered[place : place + 2]) for place in range(0, 6, 2)]
    assert sorted(width for width, _ in widths) == expected
    assert all(max(sizes) == width for width, sizes in widths)
