"""The language model with matrices in fewer bits: in layers of ours, or of a library.

A folder with weights that llm-compressor quantized is read by the library that wrote them,
compressed-tensors, through transformers, and computed with in the working dtype.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kimia_infer.layers.packed import pack_layers, packs
from kimia_infer.layers.quantization import SCHEMES, check_quantization, quantized_component
from kimia_infer.models.step_audio_editx.config import LanguageModelConfig
from kimia_infer.models.step_audio_editx.language_model import LanguageModel, llama_config
from kimia_infer.utils.errors import CheckpointError, ConfigurationError
from kimia_infer.weights.component import Component, plain_component, read_json
from kimia_infer.weights.tensors import open_directory

BITSANDBYTES = ("bnb-int8", "bnb-nf4")
VARIANTS = (*SCHEMES, *BITSANDBYTES)


def check_variant(variant: str, device: torch.device) -> None:
    """Raise ConfigurationError unless the language model can be computed so on ``device``."""
    if variant not in VARIANTS:
        raise ConfigurationError(f"quantization: expected {', '.join(VARIANTS)}, found {variant!r}")
    if variant not in BITSANDBYTES:
        check_quantization(variant, device)
    elif importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigurationError(
            f"quantization: {variant!r} takes the package bitsandbytes: pip install bitsandbytes"
        )


def load_language_model(
    folder: Path, variant: str, device: torch.device, dtype: torch.dtype
) -> LanguageModel:
    """The language model of ``folder`` for inference, in one of VARIANTS.

    Raises:
        CheckpointError: it is not complete, damaged, or quantized in a way that is not read.
        ConfigurationError: ``variant`` is for weights that are not quantized yet.
    """
    stored = read_json(folder / "config.json").get("quantization_config")
    if stored is not None:
        if variant != "none":
            raise ConfigurationError(
                f"quantization: the weights in {folder} are quantized; use 'none', or the "
                "published ones"
            )
        return _read_compressed(folder, stored, dtype).to(device)
    component = quantized_component(
        language_model_component(folder), variant if variant in SCHEMES else "none"
    )
    model = component.load(device, dtype)
    if variant in BITSANDBYTES:
        use_bitsandbytes(model, variant)
    if packs(variant, device):
        pack_layers(model.model.layers)
    return model


def language_model_component(folder: Path) -> Component[LanguageModel]:
    config = LanguageModelConfig.from_directory(folder)
    return plain_component("language model", lambda: LanguageModel(config), open_directory(folder))


@torch.no_grad()
def use_bitsandbytes(model: LanguageModel, variant: str) -> None:
    """Give the layers of ``model`` the matrices of bitsandbytes, in place."""
    library: Any = importlib.import_module("bitsandbytes.nn")
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear) or not name.startswith("model.layers."):
            continue
        sizes, weight = (layer.in_features, layer.out_features, False), layer.weight
        if variant == "bnb-int8":
            new = library.Linear8bitLt(*sizes, has_fp16_weights=False, device="meta")
            stored = library.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        else:
            options = {"quant_type": "nf4"}
            new = library.Linear4bit(*sizes, compute_dtype=weight.dtype, device="meta", **options)
            stored = library.Params4bit(weight, requires_grad=False, module=new, **options)
        # A matrix is quantized when it is moved to a device.
        new.weight = stored.to(weight.device)
        model.set_submodule(name, new.eval())


def _read_compressed(folder: Path, stored: dict[str, Any], dtype: torch.dtype) -> LanguageModel:
    """A folder that compressed-tensors quantized, restored to ``dtype`` on the CPU."""
    method = stored.get("quant_method")
    if method != "compressed-tensors":
        raise CheckpointError(
            f"{folder}/config.json: weights quantized by {method!r} are not read; use the "
            "published ones, or those of compressed-tensors"
        )
    if importlib.util.find_spec("compressed_tensors") is None:
        raise CheckpointError(
            f"{folder}: reading it takes the package compressed-tensors: "
            "pip install compressed-tensors"
        )
    config = LanguageModelConfig.from_directory(folder)
    llama: Any = llama_config(config)
    llama.quantization_config = stored | {"dequantize": True}
    from transformers import LlamaForCausalLM

    library: Any = LlamaForCausalLM
    read, report = library.from_pretrained(
        folder,
        config=llama,
        dtype=dtype,
        output_loading_info=True,
        use_safetensors=True,
    )
    restored = read.state_dict()
    with torch.device("meta"):
        model = LanguageModel(config)
    try:
        if report["missing_keys"] or report["mismatched_keys"]:
            raise RuntimeError(f"tensors are missing or have other shapes: {report}")
        # Beside the restored matrices their scales are kept, which are of no more use.
        values = {name: restored[name].to(dtype) for name in model.state_dict()}
        model.load_state_dict(values, strict=True, assign=True)
    except (RuntimeError, KeyError) as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return model.eval().requires_grad_(False)
