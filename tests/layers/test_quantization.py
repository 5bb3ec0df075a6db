"""Quantized matrices: their values, what they cost, and how near the model stays to itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimia_infer.engine.decode import Decoder
from kimia_infer.engine.generation import ControlTokens, DecodeInput, Generation
from kimia_infer.layers import operators, quantization
from kimia_infer.layers.quantization import (
    SCHEMES,
    STORAGES,
    QuantizedLinear,
    check_quantization,
    quantize,
    quantize_model,
)
from kimia_infer.layers.sampler import SeededRandomness
from kimia_infer.models.kimi_audio.language_model import LanguageModel
from kimia_infer.utils.errors import ConfigurationError
from kimia_infer.utils.graphs import graphs_for
from tests.engine.helpers import read_prompts
from tests.layers.helpers import SAMPLING, Device, logits, middle, miniature, random
from tests.traced import TracedGraphs

CPU = torch.device("cpu")
QUANTIZED = [scheme for scheme in SCHEMES if scheme != "none"]


def held(storage: str, weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A matrix after it has been quantized."""
    return STORAGES[storage].dequantize(*quantize(weight, STORAGES[storage]).values(), dtype)


def test_values_of_int8() -> None:
    """Scales are 1, 0.5 and, of a row of zeros, anything; halves are rounded to even."""
    weight = torch.tensor([[127.0, -3.4, 0.5, 1.5], [63.5, -0.2, 0.0, -63.5], [0.0] * 4])
    found = quantize(weight, STORAGES["int8"])
    assert found["weight"].tolist() == [[127, -3, 0, 2], [127, 0, 0, -127], [0] * 4]
    assert found["weight"].dtype is torch.int8 and found["scale"].dtype is torch.bfloat16
    assert found["scale"][:2].tolist() == [[1.0], [0.5]]


def test_values_of_fp8() -> None:
    """From 256 on e4m3 counts by 32, around 1 by 1/8, and its smallest number is 2**-9."""
    weight = torch.tensor([[448.0, -400.0, 1.07, 0.0025], [896.0, 2.0, 0.0, -896.0]])
    found = quantize(weight, STORAGES["fp8"])
    assert found["weight"].float().tolist() == [[448, -384, 1.125, 2**-9], [448, 1, 0, -448]]
    assert found["weight"].dtype is torch.float8_e4m3fn
    assert found["scale"].tolist() == [[1.0], [2.0]]


def test_values_of_int4() -> None:
    """The largest of each 32 becomes -8; the same size on the other side is cut to 7."""
    weight = torch.zeros(1, 64)
    weight[0, 0], weight[0, 1], weight[0, 16], weight[0, 17] = -8.0, 8.0, 3.4, -1.6
    weight[0, 32], weight[0, 63] = 4.0, -1.0
    found = quantize(weight, STORAGES["int4"])
    assert found["scale"].tolist() == [[1.0, -0.5]]
    assert found["weight"].dtype is torch.uint8 and found["weight"].shape == (1, 32)
    # Codes are values plus 8: the i-th in the low half of byte i, the i+16-th in the high one.
    assert found["weight"][0, :2].tolist() == [0 + 11 * 16, 15 + 6 * 16]
    assert found["weight"][0, 16].item() == 0 + 8 * 16
    assert found["weight"][0, 31].item() == 8 + 10 * 16
    values = held("int4", weight)[0]
    assert values[[0, 1, 16, 17, 32, 63]].tolist() == [-8.0, 7.0, 3.0, -2.0, 4.0, -1.0]
    assert values.count_nonzero() == 6


@pytest.mark.parametrize("storage", STORAGES)
def test_errors_are_bounded(storage: str) -> None:
    """Half a step, relative to what sets it; int4 may cut one side by a whole step."""
    weight = random(40, 640) * torch.logspace(-4, 2, 40)[:, None]
    error = (held(storage, weight) - weight).abs()
    largest = weight.abs().unflatten(1, (-1, 32 if storage == "int4" else 640)).amax(-1)
    largest = largest.repeat_interleave(32 if storage == "int4" else 640, 1) * 1.01
    if storage == "int8":
        assert (error <= largest / 127 / 2).all()
    elif storage == "int4":
        assert (error <= largest / 8).all() and (error <= largest / 16).float().mean() > 0.97
    else:
        smallest = largest / 448 * 2**-9
        assert (error <= (weight.abs() / 16).maximum(smallest / 2)).all()


@pytest.mark.parametrize("storage", STORAGES)
def test_quantizing_twice_changes_nothing(storage: str) -> None:
    """What is held can be held exactly, and in bfloat16 it is rounded once."""
    once = held(storage, random(8, 128))
    assert torch.equal(held(storage, once), once)
    assert torch.equal(held(storage, once, torch.bfloat16), once.bfloat16())


@pytest.mark.parametrize("storage", STORAGES)
def test_rows_do_not_depend_on_each_other(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A joined matrix is quantized in pieces, and a large one in blocks of rows."""
    weight = random(11, 64)
    whole = quantize(weight, STORAGES[storage])
    monkeypatch.setattr(quantization, "BLOCK_VALUES", 130)  # two rows
    for name, value in quantize(weight, STORAGES[storage]).items():
        assert torch.equal(value.float(), whole[name].float())


# Of a trained model, whose errors are a tenth, and of a random one.
@pytest.mark.parametrize(
    ("make", "nearest"),
    [
        (miniature, {"int8": 0.9999, "fp8": 0.9995, "int4": 0.98}),
        (middle, {"int8": 0.999, "fp8": 0.999, "int4": 0.97}),
    ],
)
def test_logits_stay_near(
    make: Callable[[], tuple[LanguageModel, DecodeInput]], nearest: dict[str, float]
) -> None:
    """By the mean cosine to those without quantization, of both tracks."""
    plain, prompt = make()
    expected = logits(plain, prompt)
    for scheme in QUANTIZED:
        found = logits(quantize_model(copy.deepcopy(plain), scheme), prompt)
        for track, reference in zip(found, expected, strict=True):
            cosine = F.cosine_similarity(track, reference, dim=-1).mean().item()
            assert nearest[scheme] <= cosine < 1, scheme


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_the_layers_and_nothing_else_are_quantized(scheme: str, model: LanguageModel) -> None:
    quantized = quantize_model(copy.deepcopy(model), scheme)
    assert (model.quantization, quantized.quantization) == ("none", scheme)
    layers = {n: m for n, m in quantized.named_modules() if isinstance(m, QuantizedLinear)}
    matrices = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers." in n}
    assert layers.keys() == matrices and len(layers) == 4 * model.config.total_layers
    for name, layer in layers.items():
        first = name.startswith(tuple(f"layers.{index}." for index in range(4)))
        storage = "int8" if ".attention." in name or (scheme == "fp8" and first) else scheme
        original = model.get_submodule(name)
        assert torch.equal(layer.dequantized(torch.float32), held(storage, original.weight))
        assert (layer.bias is None) == (original.bias is None)
        bits = 8 * (layer.weight.nbytes + layer.scale.nbytes) / original.weight.numel()
        assert bits == (4.5 if storage == "int4" else 8 + 16 / layer.in_features)
    kept = dict(quantized.named_parameters())
    for name, value in model.named_parameters():
        if name.removesuffix(".weight") not in layers:
            assert torch.equal(kept[name], value)


def test_fp8_is_coarse_whatever_its_scale() -> None:
    """Why its first layers are int8: a fourth of the smallest step of int8's is not in reach."""
    weight, errors = random(64, 512), []
    for factor in (1.0, 0.7, 0.5, 0.35):
        scale = weight.abs().amax(1, keepdim=True) / 448 * factor
        values = (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        errors.append(((values - weight).norm() / weight.norm()).item())
    assert min(errors) > 0.025
    assert (held("int8", weight) - weight).norm() / weight.norm() < 0.009


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("bias", [False, True])
def test_products(storage: str, bias: bool, dtype: torch.dtype) -> None:
    layer = QuantizedLinear(64, 24, bias, STORAGES[storage]).to(CPU)
    weight = random(24, 64)
    for name, value in quantize(weight, STORAGES[storage]).items():
        getattr(layer, name).data = value
    if bias:
        layer.bias.data = random(24, seed=1).to(dtype)
    exact = held(storage, weight, torch.float64)
    for shape in ((1, 1, 64), (2, 5, 64), (64,), (0, 64)):
        x = random(*shape, seed=2).to(dtype)
        expected = F.linear(x.double(), exact, layer.bias.double() if bias else None)
        assert layer(x).dtype is dtype
        error = 1e-5 if dtype is torch.float32 else 0.1
        torch.testing.assert_close(layer(x).double(), expected, atol=error, rtol=0)


@pytest.mark.parametrize("cut", [False, True], ids=["full", "track"])
@pytest.mark.parametrize("scheme", QUANTIZED)
def test_recorded_graphs_choose_the_same_tokens(
    scheme: str, cut: bool, model: LanguageModel, golden: Path
) -> None:
    """Both tracks, sampled, through the loop as it is launched and as it is recorded."""
    quantized = quantize_model(copy.deepcopy(model), scheme)
    quantized = quantized.with_cut_heads() if cut else quantized
    assert quantized.quantization == scheme
    prompt = next(p for p in read_prompts(golden).values() if p.features is not None)
    control = ControlTokens(model.config.base_tokens, -1, (-1,))
    answers = []
    for make_graphs in (graphs_for, TracedGraphs):
        decoder = Decoder(quantized, control, prompt.length + 12, make_graphs=make_graphs)
        generation = Generation(decoder, prompt, "both", 12, SAMPLING, SeededRandomness(5))
        for _ in generation.run():
            pass
        answers.append((generation.text_ids, generation.audio_ids))
    assert answers[0] == answers[1]
    assert len(answers[0][0]) == 12 and answers[0][1]


def test_short_rows_are_refused(model: LanguageModel) -> None:
    with torch.device("meta"):
        odd = LanguageModel(replace(model.config, intermediate_size=48))
    with pytest.raises(
        ConfigurationError, match=r"int4 .*\.down has rows of 48; use 'int8' or 'fp8'"
    ):
        quantize_model(odd, "int4")


def test_names_are_checked() -> None:
    with pytest.raises(ConfigurationError, match="expected none, fp8, int8, int4, found 'int2'"):
        check_quantization("int2", CPU)
    for scheme in SCHEMES:
        check_quantization(scheme, CPU)


def test_devices_without_the_means_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda:0")
    monkeypatch.setattr(operators, "missing", lambda device: "no C compiler is found")
    for scheme in QUANTIZED:
        with pytest.raises(
            ConfigurationError, match=f"'{scheme}' needs .*no C compiler.*use 'none'"
        ):
            check_quantization(scheme, gpu)
    check_quantization("none", gpu)
    monkeypatch.setattr(operators, "missing", lambda device: None)
    for capability, fp8 in (((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch, "get_device_module", lambda device, c=capability: Device(*c))
        check_quantization("int8", gpu)
        check_quantization("int4", gpu)
        if fp8:
            check_quantization("fp8", gpu)
            continue
        with pytest.raises(ConfigurationError, match=r"has 8\.\d; use 'int8' or 'int4'"):
            check_quantization("fp8", gpu)


def test_weights_that_are_quantized_already_have_no_other_scheme(monkeypatch) -> None:
    gpu, other = torch.device("cuda:0"), "; use the checkpoint that .* from, with quantization "
    monkeypatch.setattr(operators, "missing", lambda device: None)
    monkeypatch.setattr(torch, "get_device_module", lambda device: Device(8, 6))
    with pytest.raises(ConfigurationError, match=other + "'int8' or 'int4'$"):
        check_quantization("fp8", gpu, "fp8")
    monkeypatch.setattr(operators, "missing", lambda device: "no C compiler is found")
    with pytest.raises(ConfigurationError, match=other + "'none'$"):
        check_quantization("int8", gpu, "int8")
