"""Which files are read as Kokoro, and how others are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kimia_infer.models.kokoro.checkpoint import load_network
from kimia_infer.utils.errors import CheckpointError
from tests.models.kokoro.recorded import CPU, whole_tensors, write_pickle
from tests.models.kokoro.tiny import narrow_kokoro


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small model, whose values are all different."""
    with narrow_kokoro(tmp_path_factory.mktemp("kokoro")) as directory:
        config = json.loads((directory / "config.json").read_text())
        save_file(whole_tensors(config), directory / "model.safetensors")
        yield directory


@pytest.fixture(scope="module")
def stored(whole: Path) -> dict[str, Tensor]:
    return load_file(whole / "model.safetensors")


@pytest.fixture
def directory(whole: Path, tmp_path: Path) -> Path:
    """With the configuration alone."""
    shutil.copy(whole / "config.json", tmp_path)
    return tmp_path


def parameters(directory: Path) -> dict[str, Tensor]:
    return dict(load_network(directory, CPU).named_parameters())


def assert_equal(directory: Path, whole: Path) -> None:
    found, expected = parameters(directory), parameters(whole)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_pickle_is_read_with_either_prefix(
    directory: Path, whole: Path, stored: dict[str, Tensor]
) -> None:
    write_pickle(directory, stored, prefix="module.")
    assert_equal(directory, whole)


def test_both_forms_of_weight_norm(directory: Path, whole: Path, stored: dict[str, Tensor]) -> None:
    forms = {"weight_g": "parametrizations.weight.original0"}
    forms["weight_v"] = "parametrizations.weight.original1"
    renamed = {}
    for name, tensor in stored.items():
        layer, _, leaf = name.rpartition(".")
        renamed[f"{layer}.{forms.get(leaf, leaf)}"] = tensor
    write_pickle(directory, renamed)
    assert_equal(directory, whole)


def test_folded_weights(directory: Path, whole: Path, stored: dict[str, Tensor]) -> None:
    folded = {n: t for n, t in stored.items() if not n.endswith(("weight_g", "weight_v"))}
    for name, v in stored.items():
        if name.endswith("weight_v"):
            g = stored[f"{name[:-1]}g"]
            norm = torch.linalg.vector_norm(v, dim=(1, 2), keepdim=True)
            folded[name.removesuffix("_v")] = v * (g / norm)
    save_file(folded, directory / "model.safetensors")
    assert_equal(directory, whole)


def test_unused_pooler_may_be_there(
    directory: Path, whole: Path, stored: dict[str, Tensor]
) -> None:
    pooler = {"bert.pooler.weight": torch.zeros(32, 32), "bert.pooler.bias": torch.zeros(32)}
    save_file(stored | pooler, directory / "model.safetensors")
    assert_equal(directory, whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"predictor.lstm.weight_hh_l0": None}, "predictor.lstm.weight_hh_l0 is missing"),
        ({"decoder.decode.0.conv1.weight_v": None}, "decoder.decode.0.conv1.weight.* is missing"),
        ({"decoder.N_conv.bias": torch.zeros(2)}, r"decoder.N_conv.bias has shape \[2\]"),
        ({"decoder.more.bias": torch.zeros(2)}, "decoder.more.bias has no place"),
        ({"bert_encoder.bias": torch.zeros(16, dtype=torch.int8)}, "not hold floating point"),
    ],
)
def test_other_tensors_are_refused(
    directory: Path,
    stored: dict[str, Tensor],
    change: dict[str, Tensor | None],
    message: str,
) -> None:
    changed = {n: t for n, t in (stored | change).items() if t is not None}
    save_file(changed, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_network(directory, CPU)


def test_files_that_are_not_there(directory: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"neither kokoro-v1_0\.pth nor model.* --model kokoro"
    ):
        load_network(directory, CPU)
    (directory / "kokoro-v1_0.pth").write_bytes(b"no pickle")
    with pytest.raises(CheckpointError, match=r"kokoro-v1_0\.pth: "):
        load_network(directory, CPU)
    torch.save({"bert": {}}, directory / "kokoro-v1_0.pth")
    with pytest.raises(CheckpointError, match="entry 'bert_encoder' is missing"):
        load_network(directory, CPU)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_dim", "512", "hidden_dim: .* found '512'"),
        ("multispeaker", False, "multispeaker: .*found False"),
        ("vocab", {"ab": 1}, ".*one character"),
        ("istftnet", {}, "istftnet.upsample_rates: missing"),
    ],
)
def test_configuration(directory: Path, field: str, value: object, message: str) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(CheckpointError, match=f"config.json: {message}"):
        load_network(directory, CPU)
