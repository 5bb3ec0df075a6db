"""The language model with quantized matrices, ours and those of libraries."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from kimia_infer.layers.packed import PACKED, PackedLinear
from kimia_infer.models.step_audio_editx import variants
from kimia_infer.models.step_audio_editx.config import LanguageModelConfig
from kimia_infer.models.step_audio_editx.language_model import LanguageModel, llama_config
from kimia_infer.utils.errors import CheckpointError, ConfigurationError
from scripts.benchmark.editx_networks import SIZES

CPU = torch.device("cpu")
FIELDS = SIZES["tiny"].language_model | {"vocab_size": 256}
CONFIG = LanguageModelConfig.model_validate(FIELDS)
FOUR_BITS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("language_model")
    (root / "config.json").write_text(json.dumps(FIELDS))
    torch.manual_seed(0)
    model = LanguageModel(CONFIG)
    model.lm_head.weight.data *= 10
    save_file(dict(model.state_dict()), root / "model.safetensors")
    return root


@pytest.fixture(scope="module")
def expected(folder: Path) -> Tensor:
    return logits(variants.load_language_model(folder, "none", CPU, torch.float32))


@torch.inference_mode()
def logits(model: LanguageModel) -> Tensor:
    cache = model.new_cache(40)
    read = model.read(range(20, 50), cache)
    return torch.cat([read, model.step(torch.tensor([7]), 30, cache)]).float()


ERRORS = {"fp8": 0.005, "int8": 0.005, "int4": 0.03, "bnb-int8": 0.01, "bnb-nf4": 0.04}
"""Most of the difference, of the largest logit."""


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("variant", ERRORS)
def test_a_variant_is_near_the_plain_model(folder: Path, expected: Tensor, variant: str) -> None:
    variants.check_variant(variant, CPU)
    model = variants.load_language_model(folder, variant, CPU, torch.float32)
    layer = model.model.layers[0].get_submodule("mlp.up_proj")
    if variant in PACKED:
        assert isinstance(layer, PackedLinear) and layer.bits == {"int8": 8, "int4": 4}[variant]
    else:
        assert layer.weight.element_size() == 1
    error = (logits(model) - expected).abs().max() / expected.abs().max()
    assert 0 < error < ERRORS[variant]


@pytest.fixture(scope="module")
def compressed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the library writes it."""
    root = tmp_path_factory.mktemp("compressed")
    model = LlamaForCausalLM(llama_config(CONFIG))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    groups = {"group_0": {"targets": ["Linear"], "weights": FOUR_BITS}}
    config = QuantizationConfig.model_validate(
        {"config_groups": groups, "ignore": ["lm_head"], "format": "pack-quantized"}
        | {"quantization_status": "frozen"}
    )
    apply_quantization_config(model, config)
    for layer in model.modules():
        if hasattr(layer, "weight_scale"):
            largest = layer.weight.unflatten(1, (-1, 32)).abs().amax(2)
            layer.weight_scale.data = largest / 7
    ModelCompressor(quantization_config=config).compress_model(model)
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, root / "model.safetensors", {"format": "pt"})
    written = config.model_dump(mode="json") | {"quantization_status": "compressed"}
    (root / "config.json").write_text(json.dumps(FIELDS | {"quantization_config": written}))
    return root


def test_compressed_tensors_are_read_by_their_library(compressed: Path, expected: Tensor) -> None:
    model = variants.load_language_model(compressed, "none", CPU, torch.float32)
    error = (logits(model) - expected).abs().max() / expected.abs().max()
    assert 0 < error < 0.03
    with pytest.raises(ConfigurationError, match="are quantized; use 'none'"):
        variants.load_language_model(compressed, "int8", CPU, torch.float32)


def test_what_is_not_read_is_refused(compressed: Path, tmp_path: Path) -> None:
    fields = json.loads((compressed / "config.json").read_text())
    fields["quantization_config"]["quant_method"] = "awq"
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="quantized by 'awq' are not read"):
        variants.load_language_model(tmp_path, "none", CPU, torch.float32)
    tensors = load_file(compressed / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((compressed / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        variants.load_language_model(tmp_path, "none", CPU, torch.float32)


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"^quantization: expected none, .*'int2'"):
        variants.check_variant("int2", CPU)
