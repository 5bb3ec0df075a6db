"""Loading the published layout: names and shapes at full size, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kimia_infer.models.step_audio_editx import checkpoint, config, layout
from kimia_infer.utils.errors import CheckpointError
from scripts.benchmark.editx_networks import SIZES
from tests.models.step_audio_editx.recorded import tensors
from tests.models.step_audio_editx.stand_in import (
    sound_yaml,
    vq06_tensors,
    write_checkpoint,
    write_speaker_encoder,
)

CPU = torch.device("cpu")
MODEL, TOKENIZER = layout.MODEL_FOLDER, layout.TOKENIZER_FOLDER
SOUND = f"{MODEL}/{layout.SOUND_FOLDER}"
RECOGNIZER = f"{TOKENIZER}/{layout.RECOGNIZER_FOLDER}"

PUBLISHED = {
    "language model": (291, 3_529_706_496),
    "VQ02": (652, 157_975_648),
    "VQ06": (96, 130_629_120),
    "flow": (605, 153_754_096),
    "vocoder": (246, 20_806_557),
}
"""Tensors of each network, and their values."""


def test_networks_have_the_published_tensors() -> None:
    with torch.device("meta"):
        networks = {name: build() for name, build in SIZES["published"].builds().items()}
    found = {
        name: (len(list(network.parameters())), sum(p.numel() for p in network.parameters()))
        for name, network in networks.items()
    }
    assert found == PUBLISHED


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("editx")
    write_checkpoint(root)
    return root


@pytest.fixture
def copied(stored: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    return Path(shutil.copytree(stored, tmp_path / "editx"))


def test_what_is_loaded_is_what_is_stored(stored: Path) -> None:
    networks = checkpoint.load_networks(stored, CPU, torch.bfloat16)
    model = networks.language_model.state_dict()
    expected = load_file(stored / MODEL / "model.safetensors")
    assert model.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(model[name], tensor.bfloat16()), name
    for name, tensor in tensors("flow").items():
        assert torch.equal(networks.flow.get_parameter(name), tensor.float()), name
    encoder = networks.vq02.encoder
    for name, tensor in tensors("vq02").items():
        assert torch.equal(encoder.get_parameter(name.removeprefix("encoder.")), tensor), name
    for name, tensor in vq06_tensors().items():
        assert torch.equal(networks.vq06.get_parameter(name), tensor), name
    assert networks.vocoder.conv_pre.weight.dtype is torch.float32
    assert networks.speaker(torch.ones(7, 80)).shape == (192,)


def change_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    if path.suffix == ".pt":
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)
    else:
        content = load_file(path)
        change(content)
        save_file(content, path)


DAMAGE: list[tuple[str, Callable[[Path], object], str]] = [
    (f"{MODEL}/config.json", lambda p: change_json(p, num_attention_groups=4), "multiple of"),
    (f"{MODEL}/config.json", lambda p: change_json(p, eos_token_id=5), "3 ends a turn"),
    (f"{MODEL}/tokenizer.json", Path.unlink, r"tokenizer\.model: file missing"),
    (
        f"{MODEL}/model.safetensors",
        lambda p: change_tensors(p, lambda t: t.pop("lm_head.weight")),
        r"lm_head\.weight is missing \(language model\)",
    ),
    (
        f"{MODEL}/model.safetensors",
        lambda p: change_tensors(
            p, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
        ),
        "a program that ties them",
    ),
    (
        f"{SOUND}/flow.pt",
        lambda p: change_tensors(p, lambda t: t.update(more=torch.ones(1))),
        "tensor more has no place in the flow",
    ),
    (
        f"{SOUND}/hift.pt",
        lambda p: change_tensors(p, lambda t: t.update({"conv_pre.bias": torch.ones(3)})),
        r"conv_pre\.bias has shape \[3\], expected \[32\]",
    ),
    (f"{SOUND}/flow.pt", lambda p: torch.save([1], p), "tensors by name are missing"),
    (f"{SOUND}/cosyvoice.yaml", Path.unlink, r"cosyvoice\.yaml: file missing"),
    (f"{SOUND}/cosyvoice.yaml", lambda p: p.write_text("a: ["), "not valid YAML"),
    (
        f"{SOUND}/cosyvoice.yaml",
        lambda p: p.write_text(p.read_text().replace("<speaker_size>", "<nothing>")),
        r"flow\.spk_embed_dim: .* found None",
    ),
    (f"{SOUND}/campplus.onnx", Path.unlink, r"campplus\.onnx: file missing"),
    (f"{SOUND}/campplus.onnx", lambda p: p.write_bytes(b"x"), "not an ONNX model"),
    (f"{SOUND}/campplus.onnx", lambda p: write_speaker_encoder(p, 64), "64 values, expected 192"),
    (f"{RECOGNIZER}/am.mvn", Path.unlink, r"am\.mvn: cannot be read"),
    (
        f"{TOKENIZER}/linguistic_tokenizer.npy",
        lambda p: np.save(p, np.ones((3, 64))),
        r"expected shape \[1024, 64\], found \[3, 64\]",
    ),
    (f"{TOKENIZER}/linguistic_tokenizer.npy", lambda p: np.save(p, {}), "not an array"),
    (f"{TOKENIZER}/speech_tokenizer_v1.onnx", lambda p: p.write_bytes(b"x"), "not an ONNX file"),
    (f"{TOKENIZER}/speech_tokenizer_v1.onnx", Path.unlink, "file missing"),
]


@pytest.mark.parametrize(("file", "damage", "message"), DAMAGE)
def test_damage_is_named(
    copied: Path, file: str, damage: Callable[[Path], object], message: str
) -> None:
    damage(copied / file)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load_networks(copied, CPU, torch.float32)


def test_tags_of_classes_are_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "cosyvoice.yaml"
    path.write_text("a: !apply:os.system [touch gone]\nb: !!python/object:os.system {}\n")
    with pytest.raises(CheckpointError, match="not valid YAML"):
        config.read_plain(path)
    path.write_text("a: !apply:os.system [touch gone]\n" + sound_yaml())
    read = config.read_plain(path)
    assert read["a"] == ["touch gone"] and read["flow"]["spk_embed_dim"] == 192


def test_pickles_that_run_code_are_refused(copied: Path) -> None:
    torch.save({"a": Path("x")}, copied / SOUND / "flow.pt")
    with pytest.raises(CheckpointError, match="refused, not a plain tensor pickle"):
        checkpoint.load_networks(copied, CPU, torch.float32)
