"""Checkpoints of a run: everything an optimizer holds comes back, whatever it holds."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import nn

from kimia_infer.training.checkpoints import restore, save
from kimia_infer.training.config import FinetuneConfig, read_config
from kimia_infer.training.run_directory import (
    METRICS,
    TrainingError,
    all_checkpoints,
    newest_intact,
    path_faults,
    read_metrics,
)
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


DAMAGE: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "one byte less": lambda path: os.truncate(path, path.stat().st_size - 1),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}
FILES = ("state/state.json", "state/state.safetensors", "state/kept.safetensors", "model/m.pt")


def write_checkpoints(output: Path, *steps: int, keep: int = 9) -> None:
    """Checkpoints of the same layers, with all kinds of files."""
    layers = network()
    parameters = dict(layers.named_parameters())
    optimizer = make_optimizer(parameters, settings())
    step(layers, optimizer, "always")

    def write(folder: Path) -> None:
        for path in (folder / "m.pt", folder.parent / "state" / "kept.safetensors"):
            path.parent.mkdir()
            save_file({"a": torch.ones(9)}, path)

    for number in steps:
        values = {"settings": {"seed": 1, "output": str(output)}}
        save(output, number, parameters, optimizer, values, write, PartialState(cpu=True), keep)


NOT_NOTICED = {
    ("model/m.pt", "zeros"),  # not without reading it all
    ("state/state.json", "one byte less"),  # the end of its last line
}


@pytest.mark.parametrize(("name", "kind"), sorted({*product(FILES, DAMAGE)} - NOT_NOTICED))
def test_damage_is_named_and_the_older_checkpoint_taken(tmp_path: Path, name: str, kind: str):
    write_checkpoints(tmp_path, 1, 2)
    older, newer = all_checkpoints(tmp_path)
    assert newest_intact(tmp_path) == (newer, [])
    DAMAGE[kind](newer / name)
    found, (fault,) = newest_intact(tmp_path)
    assert found == older
    assert fault.startswith(f"{newer / name}: ")
    wanted = {"output": str(tmp_path), "seed": 1}
    assert path_faults(wanted, resume=True) == []
    assert path_faults(wanted | {"seed": 2}, resume=True)[0].startswith(f"seed: 2, but {older}")
    DAMAGE[kind](older / name)
    (refusal,) = path_faults(wanted, resume=True)
    assert refusal.startswith(f"output: {tmp_path} holds no checkpoint to resume from; ")
    assert all(str(path / name) in refusal for path in (older, newer))


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"step": 2, "files": 1}', '{"step": 2, "settings": []}']
)
def test_a_record_of_something_else_is_damaged(tmp_path: Path, text: str):
    write_checkpoints(tmp_path, 1, 2)
    older, newer = all_checkpoints(tmp_path)
    (newer / "state/state.json").write_text(text)
    found, (fault,) = newest_intact(tmp_path)
    assert found == older
    assert fault.startswith(f"{newer / 'state/state.json'}: damaged (")


def test_a_damaged_checkpoint_displaces_no_other(tmp_path: Path):
    """A run that was resumed before it removes it, and not its own, when it saves."""
    write_checkpoints(tmp_path, 1, 2, 9)
    (tmp_path / "checkpoints/step-00000009/state/state.safetensors").unlink()
    write_checkpoints(tmp_path, 3, keep=2)
    assert [path.name for path in all_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]


def test_damaged_metrics_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    good = '{"step": 1, "loss": 2.0}\n'
    (tmp_path / METRICS).write_bytes(f'{good}\0\0\n[1]\n{{"loss": 1}}\n{{"step": 2, "lo'.encode())
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]
    assert [r.getMessage().split(": ")[0] for r in caplog.records] == [
        f"{tmp_path / METRICS}:{number}" for number in (2, 3, 4, 5)
    ]
