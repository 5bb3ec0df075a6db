"""Adapters as they are read: exact, and refused by name where something is wrong."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kimia_infer.utils.errors import CheckpointError
from kimia_infer.weights import adapter as adapter_module
from kimia_infer.weights.adapter import CONFIG_NAME, PREFIX, WEIGHTS_NAME, Adapter
from kimia_infer.weights.component import Component, Slot
from kimia_infer.weights.tensors import open_directory

CONFIG = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 6,
    "target_modules": r"language_model\.layers\.\d+\.(qkv|down)",
    "base_model_name_or_path": "weights/base",
    "use_dora": False,
}


def modules(width: int = 5, layers: int = 1) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    blocks = [
        nn.ModuleDict({"qkv": nn.Linear(3, width), "down": nn.Linear(width, 3)})
        for _ in range(layers)
    ]
    model = nn.ModuleDict({"layers": nn.ModuleList(blocks), "head": nn.Linear(3, 4)})
    return {"language_model": model.requires_grad_(False), "whisper": nn.Linear(2, 2)}


def parts(
    folder: Path, width: int = 5, layers: int = 1, dtype: torch.dtype = torch.float32
) -> dict[str, Component]:
    """The modules as they are stored; ``qkv`` in two tensors."""
    found = {}
    for component, module in modules(width, layers).items():
        tensors, slots = {}, []
        for name, parameter in module.named_parameters():
            cuts = {"": (0, len(parameter))}
            if name.endswith("qkv.weight"):
                cuts = {".q": (0, 2), ".kv": (2, width)}
            for end, rows in cuts.items():
                tensors[name + end] = parameter[slice(*rows)].to(dtype).contiguous()
                slots.append(Slot(name, {name + end: tensors[name + end].shape}, rows))
        (folder / component).mkdir(parents=True)
        save_file(tensors, folder / component / "model.safetensors")
        build = partial(copy.deepcopy, module)
        found[component] = Component(component, build, slots, open_directory(folder / component))
    return found


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    shapes = {"qkv": (3, 5), "down": (5, 3)}
    tensors = {}
    for layer, (inputs, outputs) in shapes.items():
        name = f"{PREFIX}language_model.layers.0.{layer}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(2, inputs)
        tensors[f"{name}.lora_B.weight"] = torch.randn(outputs, 2)
    save_file(tensors, tmp_path / WEIGHTS_NAME)
    (tmp_path / CONFIG_NAME).write_text(json.dumps(CONFIG))
    return tmp_path


def rewrite(directory: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors, given by the ends of their names; None removes one."""
    tensors = load_file(directory / WEIGHTS_NAME)
    for end, value in changes.items():
        (name,) = [name for name in tensors if name.endswith(end.replace("__", "."))]
        tensors[name] = value
    save_file({n: t for n, t in tensors.items() if t is not None}, directory / WEIGHTS_NAME)


@pytest.mark.parametrize("rows", [1024, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_grow_by_the_scaled_product(
    directory: Path, tmp_path: Path, monkeypatch, rows: int, dtype: torch.dtype
):
    """In float32, rounded to the dtype that they are stored in; others stay as they are."""
    monkeypatch.setattr(adapter_module, "BLOCK_ROWS", rows)
    part = Adapter.read(directory).adapted(parts(tmp_path / "model", dtype=dtype))["language_model"]
    found = dict(part.load(torch.device("cpu"), torch.float32).named_parameters())
    before = modules()["language_model"]
    tensors = load_file(directory / WEIGHTS_NAME)
    for layer in ("qkv", "down"):
        a, b = (
            tensors[f"{PREFIX}language_model.layers.0.{layer}.lora_{x}.weight"] for x in ("A", "B")
        )
        old = before.get_submodule(f"layers.0.{layer}").weight.to(dtype).double()
        expected = (old + 3.0 * b.double() @ a.double()).to(dtype).float()
        torch.testing.assert_close(found[f"layers.0.{layer}.weight"], expected)
    for name in ("head.weight", "layers.0.qkv.bias"):
        assert torch.equal(found[name], before.get_parameter(name).to(dtype).float())


def test_what_is_not_an_adapter(directory: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match="file missing; not an adapter directory"):
        Adapter.read(tmp_path / "nowhere")
    for change, message in (
        ({"peft_type": "IA3"}, "not an adapter that scripts/finetune made"),
        ({"target_modules": ["qkv"]}, "not an adapter that scripts/finetune made"),
        ({"target_modules": "layers.("}, "target_modules is no pattern"),
        ({"use_dora": True}, "use_dora is not supported"),
        ({"rank_pattern": {"qkv": 4}}, "rank_pattern is not supported"),
        ({"r": 0}, "r and lora_alpha must be numbers"),
        ({"r": 3}, "not of rank 3"),
    ):
        (directory / CONFIG_NAME).write_text(json.dumps(CONFIG | change))
        with pytest.raises(CheckpointError, match=message):
            Adapter.read(directory)
    (directory / CONFIG_NAME).write_text(json.dumps(CONFIG))
    (directory / WEIGHTS_NAME).write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match=f"{WEIGHTS_NAME}: damaged"):
        Adapter.read(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv__lora_B__weight": torch.full((5, 2), torch.nan)}, "qkv.lora_B.weight holds values"),
        ({"down__lora_A__weight": None}, "down is not of rank 2"),
        ({"qkv__lora_A__weight": torch.zeros(2)}, "qkv.lora_A.weight is not a matrix"),
    ],
)
def test_damaged_tensors(directory: Path, changes: dict, message: str):
    rewrite(directory, **changes)
    with pytest.raises(CheckpointError, match=message):
        Adapter.read(directory)


def test_weights_that_are_stored_otherwise(directory: Path, tmp_path: Path):
    stored = parts(tmp_path / "model")
    part = stored["language_model"]
    packed = [replace(slot, combine=lambda value: value) for slot in part.slots]
    with pytest.raises(CheckpointError, match=r"layers.0.qkv are not stored as plain values"):
        Adapter.read(directory).adapted(stored | {"language_model": replace(part, slots=packed)})


def test_an_adapter_of_another_model(directory: Path, tmp_path: Path):
    adapter = Adapter.read(directory)
    for number, (sizes, message) in enumerate(
        (
            ({"width": 6}, r"down is for a weight of shape \[3, 5\], the model has \[3, 6\]"),
            ({"layers": 2}, r"layers.1.down is missing; it was trained on weights/base"),
            ({"layers": 0}, r"layers.0.down has no place in this model"),
        )
    ):
        with pytest.raises(CheckpointError, match=message):
            adapter.adapted(parts(tmp_path / str(number), **sizes))
