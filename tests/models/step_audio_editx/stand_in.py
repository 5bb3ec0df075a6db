"""A small checkpoint directory of the published layout, with recorded and random weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch import Tensor, nn

from kimia_infer.api import editx
from kimia_infer.models.step_audio_editx import layout, vq06
from kimia_infer.models.step_audio_editx.config import LanguageModelConfig
from kimia_infer.models.step_audio_editx.language_model import LanguageModel
from tests.models.step_audio_editx.recorded import RECORDED, sinusoids, sizes, tensors, values

VQ06_WIDTH, VQ06_LAYERS = 64, 1

LANGUAGE_MODEL = values("lm_config") | {"num_hidden_layers": 1, "vocab_size": 6144}

YAML = """\
speaker_size: 192
flow: !new:cosyvoice2.flow.flow.CausalMaskedDiffWithXvec
    spk_embed_dim: !ref <speaker_size>
    input_embedding: !new:cosyvoice2.flow.embedding.DualEmbedding
{flow}
hift: !new:cosyvoice2.hifigan.generator.HiFTGenerator
{hift}
"""


def write_checkpoint(root: Path) -> None:
    """The whole directory, with everything that ``load_networks`` reads."""
    folder, tokenizer = root / layout.MODEL_FOLDER, root / layout.TOKENIZER_FOLDER
    sound = folder / layout.SOUND_FOLDER
    recognizer = tokenizer / layout.RECOGNIZER_FOLDER
    for path in (sound, recognizer):
        path.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(LANGUAGE_MODEL))
    shutil.copy(RECORDED / "tokenizer.json", folder)
    save_file(language_model_tensors(), folder / "model.safetensors")
    (sound / "cosyvoice.yaml").write_text(sound_yaml())
    torch.save({n: t.float() for n, t in tensors("flow").items()}, sound / "flow.pt")
    torch.save(dict(tensors("hift")), sound / "hift.pt")
    write_speaker_encoder(sound / layout.SPEAKER_NAME)
    (recognizer / "config.yaml").write_text(json.dumps({"encoder_conf": encoder_config()}))
    recognized = tensors("vq02") | {"decoder.after_norm.weight": torch.ones(2)}
    torch.save(recognized, recognizer / "model.pt")
    shutil.copy(RECORDED / "am.mvn", recognizer)
    centers = tensors("vq02_golden")["kms"].float().numpy()
    np.save(tokenizer / layout.CENTERS_NAME, centers)
    write_vq06(tokenizer / layout.VQ06_NAME, vq06_tensors())


@contextmanager
def short_answers(root: Path) -> Iterator[Path]:
    """``root`` with the whole checkpoint; answers are short, as its model never ends one itself."""
    write_checkpoint(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(editx, "SLOWEST", 0.4)
        yield root


def sound_yaml() -> str:
    """``cosyvoice.yaml``, with tags that name classes, as published ones have."""

    def lines(section: dict[str, Any]) -> str:
        given = {n: v for n, v in section.items() if n != "spk_embed_dim"}
        return "\n".join(f"    {name}: {json.dumps(value)}" for name, value in given.items())

    return YAML.format(**{name: lines(section) for name, section in sizes().items()})


def encoder_config() -> dict[str, Any]:
    return values("vq02")["encoder_conf"]


def language_model_tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = LanguageModel(LanguageModelConfig.model_validate(LANGUAGE_MODEL))
    model.lm_head.weight.data *= 10
    return dict(model.state_dict())


def vq06_tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = vq06.Vq06(vq06.EncoderSizes(VQ06_WIDTH, heads=1, layers=VQ06_LAYERS))
    model.encoder.positional_embedding.data = sinusoids(1500, VQ06_WIDTH)
    nn.init.normal_(model.quantizer.get_parameter("_codebook.embed"))
    return dict(model.state_dict())


def write_vq06(path: Path, stored: dict[str, Tensor]) -> None:
    """An ONNX file with the names of nodes and the transposed matrices of the published one."""
    nodes, initializers = [], []

    def add(operator: str, name: str, *sources: str, held: tuple[str, ...] = ()) -> None:
        for source, parameter in zip(sources, held or sources, strict=True):
            value = stored[parameter]
            matrix = value.dim() == 2 and "positional" not in parameter
            array = (value.T if matrix else value).contiguous().numpy()
            initializers.append(numpy_helper.from_array(array, source))
        nodes.append(helper.make_node(operator, ["x", *sources], [f"{name}:0"], name=name))

    for layer in ("conv1", "conv2"):
        names = tuple(f"encoder.{layer}.{leaf}" for leaf in ("weight", "bias"))
        add("Conv", f"/{layer}/Conv", *(n.replace("r.", "rs.", 1) for n in names), held=names)
    held = ("encoder.positional_embedding",)
    add("Add", "/Add", "encoders.positional_embedding", held=held)
    for name in stored:
        if not name.startswith("encoder.blocks."):
            continue
        path_of = "/" + "/".join(_modules(name))
        layer, leaf = name.rsplit(".", 1)
        if "_ln." in name:
            if leaf == "weight":
                pair = (name, f"{layer}.bias")
                add("LayerNormalization", f"{path_of}/LayerNormalization", *pair)
        else:
            operator = "MatMul" if leaf == "weight" else "Add"
            add(operator, f"{path_of}/{operator}", f"onnx::{name}", held=(name,))
    codebook = ("quantizer._codebook.embed",)
    add("Pow", "/quantizer/rq/model/layers.0/_codebook/Pow_1", "onnx::embed", held=codebook)
    graph = helper.make_graph(nodes, "stand-in", [], [], initializers)
    onnx.save(helper.make_model(graph), str(path))


def _modules(name: str) -> list[str]:
    """blocks.0.mlp.2.weight -> blocks.0, mlp, mlp.2."""
    _, blocks, index, *inner, _ = name.split(".")
    found = [f"{blocks}.{index}", inner[0]]
    if len(inner) == 2:
        found.append(f"mlp.{inner[1]}" if inner[0] == "mlp" else inner[1])
    return found


def write_speaker_encoder(path: Path, size: int = 192) -> None:
    """[1, frames, 80] -> [1, size], the mean over time times a matrix."""
    rng = np.random.default_rng(0)
    matrix = numpy_helper.from_array(rng.normal(size=(80, size)).astype(np.float32), "matrix")
    axes = numpy_helper.from_array(np.array([1]), "axes")
    nodes = [
        helper.make_node("Abs", ["input"], ["size"]),
        helper.make_node("ReduceMean", ["size", "axes"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "matrix"], ["output"]),
    ]
    given = helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, "frames", 80])
    found = helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, size])
    graph = helper.make_graph(nodes, "stand-in", [given], [found], [matrix, axes])
    opset = helper.make_opsetid("", 18)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), str(path))
