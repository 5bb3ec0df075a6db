"""Checkpoints of a run: everything an optimizer holds comes back, whatever it holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import nn

from kimia_infer.training.checkpoints import restore, save
from kimia_infer.training.config import FinetuneConfig, read_config
from kimia_infer.training.run_directory import TrainingError, all_checkpoints
from kimia_infer.training.trainer import make_optimizer


def settings() -> FinetuneConfig:
    return read_config(FinetuneConfig, None, ["model=m", "data=d", "output=o"])


def network() -> nn.ModuleDict:
    """Three layers, of which a step uses those that it is told to."""
    torch.manual_seed(0)
    return nn.ModuleDict({name: nn.Linear(3, 3) for name in ("always", "late", "never")})


def step(layers: nn.ModuleDict, optimizer: torch.optim.Optimizer, *used: str) -> None:
    optimizer.zero_grad(set_to_none=True)
    x = torch.linspace(-1, 1, 6).view(2, 3)
    sum(layers[name](x).square().sum() for name in used).backward()
    optimizer.step()


def test_parameters_without_gradients_continue_as_they_were(tmp_path: Path):
    layers = network()
    parameters = dict(layers.named_parameters())
    optimizer = make_optimizer(parameters, settings())
    step(layers, optimizer, "always")
    step(layers, optimizer, "always", "late")
    state = PartialState(cpu=True)
    checkpoint = save(tmp_path, 2, parameters, optimizer, {}, Path.mkdir, state, keep=1)
    other = network()
    others = dict(other.named_parameters())
    resumed = make_optimizer(others, settings())
    assert restore(checkpoint, others, resumed) == 2
    assert others["never.weight"] not in resumed.state
    for one, its in ((layers, optimizer), (other, resumed)):
        step(one, its, "always", "late", "never")
    for name, parameter in parameters.items():
        assert torch.equal(others[name], parameter), name
    assert resumed.state[others["late.weight"]]["step"].item() == 2


def test_half_of_the_moments_is_a_damaged_checkpoint(tmp_path: Path):
    layers = network()
    parameters = dict(layers.named_parameters())
    optimizer = make_optimizer(parameters, settings())
    step(layers, optimizer, "always")
    state = PartialState(cpu=True)
    checkpoint = save(tmp_path, 1, parameters, optimizer, {}, Path.mkdir, state, keep=1)
    path = checkpoint / "state" / "state.safetensors"
    kept = {n: t for n, t in load_file(path).items() if not n.startswith("exp_avg_sq")}
    save_file(kept, path)
    with pytest.raises(TrainingError, match=r"does not fit this run .*exp_avg_sq"):
        restore(checkpoint, parameters, optimizer)


def test_an_unfinished_checkpoint_is_not_one(tmp_path: Path):
    parameters = dict(network().named_parameters())
    optimizer = make_optimizer(parameters, settings())
    state = PartialState(cpu=True)

    def write(folder: Path) -> None:
        folder.mkdir()
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 2, parameters, optimizer, {}, write, state, keep=1)
    assert not list((tmp_path / "checkpoints").iterdir())
    (tmp_path / "checkpoints" / ".step-00000001.part" / "model").mkdir(parents=True)
    for number in (2, 3):
        save(tmp_path, number, parameters, optimizer, {}, Path.mkdir, state, keep=1)
    assert all_checkpoints(tmp_path) == list((tmp_path / "checkpoints").iterdir())
    assert [path.name for path in all_checkpoints(tmp_path)] == ["step-00000003"]
