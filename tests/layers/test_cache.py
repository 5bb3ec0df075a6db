"""Keys and values in 8 bits: what is stored, what is read, and how near the model stays."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kimia_infer.engine.decode import Decoder
from kimia_infer.engine.generation import ControlTokens, Generation
from kimia_infer.layers.attention import (
    BACKENDS,
    KV_CACHES,
    CachedAttention,
    KeyValueCache,
    check_kv_cache,
    rotate,
    split_heads,
)
from kimia_infer.layers.quantization import SCHEMES, quantize_model
from kimia_infer.layers.sampler import SeededRandomness
from kimia_infer.models.kimi_audio.language_model import LanguageModel
from kimia_infer.utils.errors import ConfigurationError
from kimia_infer.utils.graphs import graphs_for
from tests.engine.helpers import read_prompts
from tests.layers.helpers import (
    SAMPLING,
    Device,
    logits,
    middle,
    miniature,
    random,
    reference,
)
from tests.traced import TracedGraphs

CPU, FP8 = torch.device("cpu"), torch.float8_e4m3fn
# e4m3 counts by 1/8 from 1 on and by 32 from 256 on; 448 is its largest number.
GIVEN = [1.07, -300.0, 449.0, -1e6, 0.0, 2.0**-9, 17.0, -1.0]
HELD = [1.125, -288.0, 448.0, -448.0, 0.0, 2.0**-9, 16.0, -1.0]


def narrow_cache(capacity: int = 6, dtype: torch.dtype = torch.float32) -> KeyValueCache:
    cache = KeyValueCache(
        3, 2, 8, capacity, capacity, rope_theta=1e6, device=CPU, dtype=dtype, cache_dtype=FP8
    )
    cache.keys.zero_()
    cache.values.zero_()
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", [slice(2, 3), torch.tensor([2])], ids=["span", "index"])
def test_what_is_read_is_what_e4m3_holds(place, dtype: torch.dtype) -> None:
    cache = narrow_cache(dtype=dtype)
    _, heads, _, dim = cache.keys.shape
    given = torch.tensor(GIVEN, dtype=dtype).repeat(dim // 8).expand(heads, 1, dim)
    cache.store(1, place, given, -given)
    keys, values = cache.read(1, 0, 4)
    assert keys.dtype is values.dtype is dtype and keys.shape == (1, heads, 4, dim)
    held = torch.tensor(HELD, dtype=dtype).repeat(dim // 8).expand(heads, dim)
    assert torch.equal(keys[0, :, 2], held) and torch.equal(values[0, :, 2], -held)
    assert not keys[0, :, [0, 1, 3]].any() and not cache.read(0, 0, 6)[0].any()
    assert cache.keys.dtype is cache.values.dtype is FP8 and cache.keys.itemsize == 1


def rounded(x: Tensor) -> Tensor:
    return x.to(FP8).to(x.dtype)


def test_attention_reads_rounded_keys_and_values() -> None:
    """A sequence and, after it, a token; against attention written out per head."""
    cache = narrow_cache(9)
    _, kv_heads, _, dim = cache.keys.shape
    heads = 2 * kv_heads
    qkv = random(1, 6, (heads + 2 * kv_heads) * dim)
    query, keys, values = split_heads(qkv, kv_heads, dim)
    query, keys = (rotate(x, cache.cos[:6], cache.sin[:6]) for x in (query, keys))
    expected = reference(query, rounded(keys), rounded(values)).transpose(1, 2).flatten(2)
    attention = CachedAttention(BACKENDS["sdpa"], cache)
    torch.testing.assert_close(attention.sequence(0, 0)(qkv[:, :5], 2), expected[:, :5])
    start, position = torch.tensor([0]), torch.tensor([5])
    for attend in (attention.tokens([0], [5]), attention.recorded_tokens(start, position, 9)):
        torch.testing.assert_close(attend(qkv[:, 5:], 2), expected[:, 5:])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_recorded_graphs_choose_the_same_tokens(scheme: str, model: LanguageModel, golden) -> None:
    """Whatever the weights are held in, as the loop launches it and as it is recorded."""
    quantized = quantize_model(copy.deepcopy(model), scheme)
    prompt = next(p for p in read_prompts(golden).values() if p.features is not None)
    control = ControlTokens(model.config.base_tokens, -1, (-1,))
    answers = []
    for make_graphs in (graphs_for, TracedGraphs):
        capacity = prompt.length + 12
        decoder = Decoder(quantized, control, capacity, make_graphs=make_graphs, kv_cache="fp8")
        generation = Generation(decoder, prompt, "both", 12, SAMPLING, SeededRandomness(5))
        for _ in generation.run():
            pass
        assert decoder.attention.cache.keys.dtype is FP8
        answers.append((generation.text_ids, generation.audio_ids))
    assert answers[0] == answers[1]
    assert len(answers[0][0]) == 12 and answers[0][1]


@pytest.mark.parametrize(("make", "nearest"), [(miniature, 0.999), (middle, 0.997)])
def test_logits_stay_near(make, nearest: float) -> None:
    model, prompt = make()
    for found, expected in zip(logits(model, prompt, FP8), logits(model, prompt), strict=True):
        cosine = F.cosine_similarity(found, expected, dim=-1).mean().item()
        assert nearest <= cosine < 1


def test_names_and_devices_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KV_CACHES:
        check_kv_cache(name, CPU)
    with pytest.raises(ConfigurationError, match="kv_cache: expected none or fp8, found 'int8'"):
        check_kv_cache("int8", CPU)
    for capability, refused in (((8, 6), True), ((8, 9), False), ((9, 0), False)):
        monkeypatch.setattr(torch, "get_device_module", lambda device, c=capability: Device(*c))
        check_kv_cache("none", torch.device("cuda:0"))
        if not refused:
            check_kv_cache("fp8", torch.device("cuda:0"))
            continue
        with pytest.raises(
            ConfigurationError, match=r"kv_cache: 'fp8' needs .*has 8\.6; use 'none'"
        ):
            check_kv_cache("fp8", torch.device("cuda:0"))


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_other_accelerators_have_no_narrow_cache(kind: str) -> None:
    check_kv_cache("none", torch.device(kind))
    with pytest.raises(ConfigurationError, match=rf"'fp8' needs a CUDA .* not {kind}; use 'none'"):
        check_kv_cache("fp8", torch.device(kind))


def test_a_decoder_refuses_unknown_caches(model: LanguageModel) -> None:
    with pytest.raises(ConfigurationError, match="kv_cache: expected none or fp8"):
        Decoder(model, ControlTokens(0, 1, (1,)), 8, kv_cache="fp4")
