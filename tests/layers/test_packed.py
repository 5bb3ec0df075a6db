"""Quantized matrices that a CPU reads as they are stored: what a product is, and in a model."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimia_infer.engine.generation import DecodeInput
from kimia_infer.layers import packed
from kimia_infer.layers.packed import PackedLinear, can_pack, pack_groups
from kimia_infer.layers.quantization import (
    GROUP,
    SCHEMES,
    STORAGES,
    QuantizedLinear,
    quantize,
    quantize_model,
)
from kimia_infer.models.kimi_audio.language_model import LanguageModel, use_packed
from tests.layers.helpers import logits, miniature


def quantized_layer(storage: str, columns: int, rows: int, bias: bool) -> QuantizedLinear:
    """A random one."""
    layer = QuantizedLinear(columns, rows, bias, STORAGES[storage])
    for leaf, value in quantize(torch.randn(rows, columns), STORAGES[storage]).items():
        setattr(layer, leaf, nn.Parameter(value, requires_grad=False))
    if layer.bias is not None:
        layer.bias = nn.Parameter(torch.randn(rows), requires_grad=False)
    return layer


def rounded(x: Tensor, block: int) -> Tensor:
    """The values [..., columns] to 8 bits, the largest of each block being 127."""
    blocks = x.unflatten(-1, (-1, block))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    return ((blocks / scale.where(scale != 0, 1)).round() * scale).flatten(-2)


@pytest.mark.parametrize("storage", packed.PACKED)
@pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 1), (2, 7), (0,)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_a_product_is_that_of_the_stored_values_and_the_rounded_row(
    storage: str, shape: tuple[int, ...], bias: bool
) -> None:
    torch.manual_seed(0)
    group = nn.ModuleDict(
        {
            "wide": quantized_layer(storage, 4 * GROUP, 40, bias),
            "tall": quantized_layer(storage, GROUP, 200, bias),
        }
    )
    before = dict(group.named_children())
    pack_groups([group])
    assert all(p.numel() == 1 for name, p in group.named_parameters() if "bias" not in name)
    for name, layer in before.items():
        assert isinstance(layer, QuantizedLinear)
        x = torch.randn(*shape, layer.in_features)
        found = group[name](x)
        expected = F.linear(rounded(x, group[name].block), layer.dequantized(x.dtype), layer.bias)
        torch.testing.assert_close(found, expected, rtol=0, atol=3e-5)
        assert group[name](x.bfloat16()).dtype is torch.bfloat16


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(value: float) -> None:
    layer = packed.packed(nn.Linear(2 * GROUP, 4, bias=False))
    x = torch.ones(2, 2 * GROUP)
    x[1, 5] = value
    finite = layer(x).isfinite()
    assert finite[0].all() and not finite[1].any()


def test_what_is_not_packed() -> None:
    assert not can_pack(nn.Linear(GROUP, 4))
    assert not can_pack(QuantizedLinear(GROUP, 4, False, STORAGES["fp8"]))
    assert not can_pack(QuantizedLinear(GROUP + 8, 4, False, STORAGES["int8"]))


@pytest.fixture(scope="module")
def question() -> tuple[LanguageModel, DecodeInput]:
    return miniature()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_model_reads_its_packed_matrices(
    scheme: str, question: tuple[LanguageModel, DecodeInput]
) -> None:
    """Also through heads in 8 bits; other schemes and their heads stay as they are."""
    model, prompt = quantize_model(copy.deepcopy(question[0]), scheme), question[1]
    before = logits(model, prompt)
    use_packed(model)
    packs = scheme in packed.PACKED
    assert any(isinstance(layer, PackedLinear) for layer in model.modules()) == packs
    assert isinstance(model.text_head, PackedLinear) == packs
    for found, expected in zip(logits(model, prompt), before, strict=True):
        assert F.cosine_similarity(found, expected, dim=-1).mean() > 0.999


def test_without_its_packages_a_model_stays_as_it_is(
    question: tuple[LanguageModel, DecodeInput],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(packed, "missing", lambda: "onnx")
    model = quantize_model(copy.deepcopy(question[0]), "int8")
    with caplog.at_level(logging.WARNING, "kimia_infer"):
        use_packed(model)
    assert not any(isinstance(layer, PackedLinear) for layer in model.modules())
    assert "Without the package onnx, int8 saves memory" in caplog.text
