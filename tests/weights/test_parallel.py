"""Several readers at once: the same modules, bounded progress, one clear error."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kimia_infer.models.kimi_audio.components import checkpoint_components
from kimia_infer.utils.errors import CheckpointError
from kimia_infer.weights import tensors
from kimia_infer.weights.component import Component, Slot
from kimia_infer.weights.parallel import load_modules
from kimia_infer.weights.tensors import TensorStore, open_model_file, open_safetensors
from tests.paths import MINI
from tests.weights.bloated import write_bloated

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks also where tensors are small."""
    monkeypatch.setattr(tensors, "BLOCK_BYTES", 4096)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pickled", [False, True])
def test_readers_give_what_one_part_at_a_time_gives(
    tmp_path: Path, small: None, dtype: torch.dtype, pickled: bool
) -> None:
    directory = write_bloated(MINI, tmp_path / "bloated") if pickled else MINI
    components = {
        name: stored.component for name, stored in checkpoint_components(directory).items()
    }
    reports: list[int] = []
    given = {name: (component, dtype) for name, component in components.items()}
    modules = load_modules(given, CPU, reports.append)
    assert modules.keys() == components.keys()
    for name, module in modules.items():
        state, other = module.state_dict(), components[name].load(CPU, dtype).state_dict()
        assert state.keys() == other.keys()
        assert all(torch.equal(state[name], other[name]) for name in state)
        assert not module.training and not any(p.requires_grad for p in module.parameters())
        assert all(p.dtype == dtype for p in module.parameters())
    assert sum(reports) == sum(component.elements for component in components.values())
    assert len(reports) > sum(len(component.slots) for component in components.values()) // 2


class Rows(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.rows = nn.ParameterList(nn.Parameter(torch.zeros(4096)) for _ in range(count))


def rows_component(directory: Path, count: int) -> Component:
    names = [f"rows.{index}" for index in range(count)]
    path = directory / "model.safetensors"
    save_file({name: torch.full((4096,), float(i)) for i, name in enumerate(names)}, path)
    slots = [Slot(name, {name: (4096,)}) for name in names]
    return Component("rows", lambda: Rows(count), slots, open_safetensors([path]), ())


def test_tensors_are_read_at_the_same_time(tmp_path: Path, small: None, monkeypatch) -> None:
    """Every reader waits until the others are reading, too: one after another would hang."""
    readers = 4
    meeting, blocks = threading.Barrier(readers, timeout=30), TensorStore.blocks
    met = threading.local()

    def wait(store: TensorStore, name: str, buffer: torch.Tensor):
        if not hasattr(met, "done"):
            met.done = True
            meeting.wait()
        return blocks(store, name, buffer)

    part = rows_component(tmp_path, 64)
    monkeypatch.setattr(TensorStore, "blocks", wait)
    module = load_modules({"rows": (part, torch.float32)}, CPU, readers=readers)["rows"]
    assert [int(row[0]) for row in module.rows] == list(range(64))
    assert not meeting.broken


def test_the_first_error_stops_the_others(tmp_path: Path, small: None) -> None:
    part = rows_component(tmp_path, 400)
    path = tmp_path / "model.safetensors"
    started = threading.active_count()
    checked: list[str] = []

    def checksum(stored: tensors.StoredTensor) -> int:
        checked.append(stored.name)
        return -1

    with pytest.raises(CheckpointError, match=rf"{path}: tensor rows\.\d+ is damaged"):
        load_modules({"rows": (part, torch.float32)}, CPU, checksum=checksum, readers=2)
    assert len(checked) <= 2  # one per reader
    assert threading.active_count() == started


def test_an_error_stops_a_reader_in_the_middle_of_a_tensor(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tensors, "BLOCK_BYTES", 8)
    names, path = ("rows.0", "rows.1"), tmp_path / "model.safetensors"
    save_file({name: torch.ones(4096) for name in names}, path)
    slots = [Slot(name, {name: (4096,)}) for name in names]
    part = Component("rows", lambda: Rows(2), slots, open_safetensors([path]), ())
    both, reports = threading.Barrier(2, timeout=30), []

    def checksum(stored: tensors.StoredTensor) -> int:
        both.wait()
        if stored.name == "rows.1":
            raise CheckpointError("rows.1 is not listed")
        return 0

    def report(values: int) -> None:
        reports.append(values)
        time.sleep(0.01)  # the other tensor would take 20 seconds

    with pytest.raises(CheckpointError, match=r"rows\.1 is not listed"):
        load_modules({"rows": (part, torch.float32)}, CPU, report, checksum, readers=2)
    assert len(reports) < 1000


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_ends_all_readers(
    tmp_path: Path, small: None, error: type[BaseException]
) -> None:
    started, reports = threading.active_count(), []

    def report(values: int) -> None:
        reports.append(values)
        if len(reports) == 5:
            raise error

    with pytest.raises(error):
        load_modules(
            {"rows": (rows_component(tmp_path, 400), torch.float32)}, CPU, report, readers=3
        )
    assert 5 <= len(reports) < 5 + 3  # others may have been about to report
    assert threading.active_count() == started


def test_a_file_that_shrinks_after_its_header_was_read_is_named(tmp_path: Path) -> None:
    part, path = rows_component(tmp_path, 4), tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"{path}: tensor rows\.3: the file ends"):
        load_modules({"rows": (part, torch.float32)}, CPU)
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"{path}: tensor rows\.\d: .*No such file"):
        load_modules({"rows": (part, torch.float32)}, CPU)


def test_a_pickle_is_read_by_several_threads(tmp_path: Path, small: None) -> None:
    """Also where its elements are stored in another order, or inside a larger storage."""
    joined = torch.arange(40 * 4096.0).view(40, 4096)
    values = {f"rows.{i}": row for i, row in enumerate(joined)}
    values["turned"] = torch.arange(6.0).view(2, 3)[:, 1:].T
    torch.save({"state_dict": values}, tmp_path / "model.pt")
    slots = [Slot(name, {name: tuple(value.shape)}) for name, value in values.items()]

    class Turned(Rows):
        def __init__(self) -> None:
            super().__init__(40)
            self.turned = nn.Parameter(torch.zeros(2, 2))

    part = Component("rows", Turned, slots, open_model_file(tmp_path, "state_dict"), ())
    module = load_modules({"rows": (part, torch.float32)}, CPU)["rows"]
    assert torch.equal(torch.stack(list(module.rows)), joined)
    assert torch.equal(module.turned, values["turned"])
