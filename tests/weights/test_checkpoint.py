"""Loading: what a slot fills, what is refused and how, and what it costs in memory."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kimia_infer.utils.errors import CheckpointError
from kimia_infer.weights.component import (
    Component,
    Slot,
    expected_tensors,
    identity_slots,
    read_json,
)
from kimia_infer.weights.parallel import READERS
from kimia_infer.weights.tensors import (
    BLOCK_BYTES,
    Reader,
    TensorStore,
    open_directory,
    open_model_file,
    open_pickle,
    open_safetensors,
)
from tests.paths import ROOT

INDEX = "model.safetensors.index.json"
CPU = torch.device("cpu")


class Pair(nn.Module):
    """Two joined projections and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.joined = nn.Linear(4, 5, bias=False)
        self.norm = nn.LayerNorm(4, bias=False)


SLOTS = [
    Slot("joined.weight", {"a.weight": (2, 4)}, (0, 2)),
    Slot("joined.weight", {"b.g": (3, 1), "b.v": (3, 4)}, (2, 5), lambda g, v: g * v),
    Slot("norm.weight", {"norm.weight": (4,)}),
]
SHARDS = {"model-1-of-9.safetensors": ("a.weight", "b.g"), "model-x.safetensors": ("b.v",)}
LAST = "model-2-of-2.safetensors"


def stored() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(s, generator=generator) for n, s in expected_tensors(SLOTS).items()}


def write(directory: Path, tensors: dict[str, Tensor]) -> Path:
    """A sharded checkpoint with shard names that follow no pattern."""
    shards = {name: list(names) for name, names in SHARDS.items()}
    shards[LAST] = [n for n in tensors if not any(n in names for names in SHARDS.values())]
    weight_map = {}
    for shard, names in shards.items():
        present = [name for name in names if name in tensors]
        save_file({name: tensors[name] for name in present}, directory / shard)
        weight_map |= dict.fromkeys(present, shard)
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return directory


def part(store: TensorStore, ignored: tuple[str, ...] | None = ()) -> Component:
    return Component("pair", Pair, SLOTS, store, ignored)


def edit_index(directory: Path, change: Callable[[dict], None]) -> None:
    index = json.loads((directory / INDEX).read_text())
    change(index)
    (directory / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slots_fill_joined_rows_in_any_dtype(tmp_path: Path, dtype: torch.dtype):
    tensors = stored()
    tensors["a.weight"] = tensors["a.weight"].half()
    reports: list[int] = []
    loading = part(open_directory(write(tmp_path, tensors)))
    module = loading.load(CPU, dtype, reports.append)
    expected = torch.cat([tensors["a.weight"].float(), tensors["b.g"] * tensors["b.v"]])
    assert torch.equal(module.joined.weight, expected.to(dtype))
    assert torch.equal(module.norm.weight, tensors["norm.weight"].to(dtype))
    assert not module.training and not any(p.requires_grad for p in module.parameters())
    assert reports == [8, 15, 4] and loading.elements == 27


def test_identity_slots_load_a_module_as_it_was_stored(tmp_path: Path):
    original = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    save_file(original.state_dict(), tmp_path / "model.safetensors")
    slots = identity_slots(original)
    loaded = Component(
        "stack",
        lambda: nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)),
        slots,
        open_directory(tmp_path),
        ignored=(),
    ).load(CPU, torch.float32)
    for name, value in original.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_under_takes_the_first_prefix_that_occurs(tmp_path: Path):
    names = ("model.encoder.a", "model.encoder.b", "model.decoder.a")
    save_file({n: torch.full((2,), float(i)) for i, n in enumerate(names)}, tmp_path / "m")
    store = open_safetensors([tmp_path / "m"])
    inner = store.under("speech.", "encoder.")
    assert sorted(inner.tensors) == ["a", "b"]
    assert inner.tensors["b"].shape == (2,) and Reader().tensor(inner, "b")[0] == 1.0
    assert sorted(store.under("model.decoder.", "").tensors) == ["a"]
    assert sorted(store.under("").tensors) == sorted(names)
    with pytest.raises(CheckpointError, match=r"m: no tensor whose name contains 'x\.' or 'y\.'"):
        store.under("x.", "y.")


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


BAD: dict[str, tuple[Callable[[Path, dict], None], str, str]] = {
    # change to directory and tensors, file and rest of the message
    "index missing": (lambda d, t: (d / INDEX).unlink(), "model.safetensors", "file missing"),
    "shard missing": (lambda d, t: (d / LAST).unlink(), LAST, "file missing"),
    "index not JSON": (lambda d, t: (d / INDEX).write_text("{"), INDEX, "not a safetensors index"),
    "index without map": (lambda d, t: (d / INDEX).write_text("{}"), INDEX, "not a safetensors"),
    "index of numbers": (
        lambda d, t: edit_index(d, lambda i: i["weight_map"].update({"norm.weight": 3})),
        INDEX,
        "not a safetensors index",
    ),
    "tensor missing": (lambda d, t: write(d, without(t, "norm.weight")), "", "norm.weight"),
    "tensor in another shard": (
        lambda d, t: edit_index(d, lambda i: i["weight_map"].update({"a.weight": LAST})),
        LAST,
        "tensor a.weight, which the index places here, is missing",
    ),
    "wrong shape": (
        lambda d, t: write(d, {**t, "b.v": t["b.v"].T.contiguous()}),
        "model-x.safetensors",
        r"tensor b.v has shape [4, 3], expected [3, 4]",
    ),
    "unexpected tensor": (
        lambda d, t: write(d, {**t, "extra.weight": torch.ones(1)}),
        LAST,
        "tensor extra.weight has no place in the pair",
    ),
    "integers": (
        lambda d, t: write(d, {**t, "b.g": torch.ones(3, 1, dtype=torch.int64)}),
        "model-1-of-9.safetensors",
        "tensor b.g does not hold floating point",
    ),
    "cut in the data": (
        lambda d, t: truncate(d / LAST, (d / LAST).stat().st_size - 4),
        LAST,
        "truncated: tensor norm.weight",
    ),
    "cut in the header": (lambda d, t: truncate(d / LAST, 20), LAST, "truncated inside its header"),
    "empty": (lambda d, t: truncate(d / LAST, 0), LAST, ""),
    "not safetensors": (lambda d, t: (d / LAST).write_bytes(b"PK" * 500), LAST, ""),
    "shard above the directory": (
        lambda d, t: outside(d, "../outside.safetensors"),
        INDEX,
        "tensor norm.weight is said to be in '../outside.safetensors', outside",
    ),
    "shard at an absolute path": (
        lambda d, t: outside(d, str(d.parent / "outside.safetensors")),
        INDEX,
        "tensor norm.weight is said to be in ",
    ),
}


def without(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {other: value for other, value in tensors.items() if other != name}


def outside(directory: Path, shard: str) -> None:
    (directory / LAST).rename(directory.parent / "outside.safetensors")
    edit_index(directory, lambda index: index["weight_map"].update({"norm.weight": shard}))


@pytest.mark.parametrize("case", BAD)
def test_a_bad_checkpoint_is_refused_naming_file_and_tensor(tmp_path: Path, case: str):
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    part(open_directory(write(directory, stored()))).load(CPU, torch.float32)
    change, file, message = BAD[case]
    change(directory, stored())
    with pytest.raises(CheckpointError) as error:
        part(open_directory(directory)).load(CPU, torch.float32)
    assert str(error.value).startswith(f"{directory / file}: ")
    assert message in str(error.value)


@pytest.mark.parametrize("case", [name for name in BAD if name != "integers"])
def test_nothing_is_read_before_the_refusal(tmp_path: Path, case: str, monkeypatch):
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    write(directory, stored())
    BAD[case][0](directory, stored())
    monkeypatch.setattr(TensorStore, "blocks", None)
    with pytest.raises(CheckpointError):
        part(open_directory(directory))


def test_ignored_patterns_and_none(tmp_path: Path):
    store = open_directory(write(tmp_path, {**stored(), "layers.3.inv_freq": torch.ones(1)}))
    part(store, ignored=("layers.*.inv_freq",)).load(CPU, torch.float32)
    part(store, ignored=None).load(CPU, torch.float32)
    with pytest.raises(CheckpointError, match=r"layers\.3\.inv_freq"):
        part(store, ignored=("inv_freq",))


def test_the_index_alone_decides_between_two_copies(tmp_path: Path):
    tensors = stored()
    write(tmp_path, tensors)
    save_file(
        {"b.v": tensors["b.v"], "a.weight": -tensors["a.weight"]}, tmp_path / "model-x.safetensors"
    )
    module = part(open_directory(tmp_path)).load(CPU, torch.float32)
    assert torch.equal(module.joined.weight[:2], tensors["a.weight"])


class Code:
    """A pickle that makes a directory when it is read without care."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path: Path, legacy: bool):
    trace, path = tmp_path / "trace", tmp_path / "model.pt"
    content = {"state_dict": {"a.weight": torch.ones(2)}, "hook": Code(trace)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=re.escape(str(path))) as error:
        open_pickle(path, "state_dict")
    assert "refused" in str(error.value) or legacy
    assert not trace.exists()
    torch.load(path, weights_only=False)  # the code was live
    assert trace.exists()


def test_a_plain_pickle_with_code_is_refused_and_does_not_run(tmp_path: Path):
    (tmp_path / "model.pt").write_bytes(pickle.dumps(Code(tmp_path / "trace")))
    with pytest.raises(CheckpointError, match=r"model\.pt"):
        open_pickle(tmp_path / "model.pt", "state_dict")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {}}, "entry 'generator' is missing"),
        ({"generator": torch.ones(2)}, "entry 'generator' is missing"),
        ([1, 2], "entry 'generator' is missing"),
    ],
)
def test_a_pickle_of_something_else_is_refused(tmp_path: Path, content: object, message: str):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=rf"model\.pt: {message}"):
        open_model_file(tmp_path, "generator")


@pytest.mark.parametrize("keep", [0, 100, -1, 0.5])
def test_a_cut_pickle_is_refused(tmp_path: Path, keep: float):
    path = tmp_path / "model.pt"
    torch.save({"generator": {"a.weight": torch.ones(5000)}}, path)
    size = path.stat().st_size
    truncate(path, int(size * keep) if isinstance(keep, float) else keep)
    with pytest.raises(CheckpointError, match=r"model\.pt: (unreadable or truncated|refused)"):
        open_model_file(tmp_path, "generator")


def test_pickles_are_read_by_section_and_safetensors_come_first(tmp_path: Path):
    tensors = stored()
    torch.save({"generator": tensors, "epoch": 3, "steps": {"a.weight": 1}}, tmp_path / "model.pt")
    module = part(open_model_file(tmp_path, "generator")).load(CPU, torch.float32)
    assert torch.equal(module.norm.weight, tensors["norm.weight"])
    with pytest.raises(CheckpointError, match=rf"{tmp_path / 'model.pt'}: tensor b\.g has shape"):
        Component(
            "x", Pair, [Slot("norm.weight", {"b.g": (9,)})], open_model_file(tmp_path, "generator")
        )
    save_file({**tensors, "norm.weight": torch.full((4,), 7.0)}, tmp_path / "model.safetensors")
    module = part(open_model_file(tmp_path, "generator")).load(CPU, torch.float32)
    assert torch.equal(module.norm.weight, torch.full((4,), 7.0))


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "file missing"), ("{", "not valid JSON"), ("[]", "object"), ("\xff", "not valid JSON")],
)
def test_bad_configurations_are_named(tmp_path: Path, content: str | None, message: str):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{message}"):
        read_json(path)


MEASURE = """
import sys, torch
from pathlib import Path
from torch import nn
from kimia_infer.weights.component import Component, identity_slots
from kimia_infer.weights.tensors import open_directory, open_model_file
from kimia_infer.weights.parallel import load_modules

def memory(field):
    for line in open("/proc/self/status"):
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024

class Stack(nn.Module):
    def __init__(self, layers, rows):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1024, rows, bias=False) for _ in range(layers))

directory, layers, rows = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
with torch.device("meta"):
    slots = identity_slots(Stack(layers, rows))
torch.ones(8, 8).to(torch.bfloat16)
open("/proc/self/clear_refs", "w").write("5")  # start the high-water mark afresh
before = memory("VmRSS")
sharded = (directory / "model.safetensors.index.json").exists()
store = open_directory(directory) if sharded else open_model_file(directory, "state_dict")
part = Component("stack", lambda: Stack(layers, rows), slots, store, ignored=())
module = load_modules({"rows": (part, torch.bfloat16)}, torch.device("cpu"))["rows"]
print(memory("VmHWM") - before, sum(p.nbytes for p in module.parameters()),
      sum(float(p.float().sum()) for p in module.parameters()))
"""


def measure(directory: Path, layers: int, rows: int) -> tuple[int, int, float]:
    """Peak growth of resident memory while loading, bytes of the loaded module, its sum."""
    command = [sys.executable, "-c", MEASURE, str(directory), str(layers), str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    growth, size, total = done.stdout.split()
    return int(growth), int(size), float(total)


MARGIN = 32 * 2**20

linux_only = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads /proc")


@linux_only
def test_a_pickle_costs_neither_its_optimizer_state_nor_its_whole_size(tmp_path: Path):
    path, ballast, layers, rows = tmp_path / "model.pt", 300 * 2**20, 8, 8192
    weights = {f"layers.{i}.weight": torch.full((rows, 1024), 0.5) for i in range(layers)}
    optimizer = torch.zeros(ballast // 4)
    try:
        torch.save({"state_dict": weights, "optimizer_states": [{"exp_avg": optimizer}]}, path)
        growth, size, total = measure(tmp_path, layers, rows)
    finally:
        path.unlink()
    layer = rows * 1024 * 4
    assert total == 0.5 * layers * rows * 1024
    limit = size + READERS * BLOCK_BYTES + MARGIN
    assert growth < limit < size + layers * layer


@linux_only
def test_loading_needs_one_block_a_reader_besides_the_module(tmp_path: Path):
    shards, rows = 6, 16384
    weight_map = {}
    try:
        for index in range(shards):
            name, shard = f"layers.{index}.weight", f"model-{index}.safetensors"
            save_file({name: torch.ones(rows, 1024)}, tmp_path / shard)
            weight_map[name] = shard
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        growth, size, total = measure(tmp_path, shards, rows)
    finally:
        for path in tmp_path.glob("*.safetensors"):
            path.unlink()
    assert total == shards * rows * 1024
    assert growth < size + READERS * BLOCK_BYTES + MARGIN < size + shards * rows * 1024 * 4
