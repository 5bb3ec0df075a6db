"""The choice of an attention backend, and that all see the same tensors the same way."""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest
import torch
from torch import Tensor

from kimia_infer.layers import attention, operators
from kimia_infer.layers.attention import (
    BACKENDS,
    CachedAttention,
    KeyValueCache,
    choose_backend,
    rotate,
)
from kimia_infer.utils.errors import ConfigurationError
from tests.layers.helpers import reference

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HEADS, KV_HEADS, DIM, FILLED, CAPACITY = 6, 2, 8, 7, 16


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with flash-attn's signatures: [batch, length, heads, head_dim], causal."""

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        assert causal
        return reference(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    def flash_attn_with_kvcache(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor
    ) -> Tensor:
        assert cache_seqlens.dtype == torch.int32 and q.shape[1] == 1
        (length,) = cache_seqlens.tolist()
        return flash_attn_func(q, k_cache[:, :length], v_cache[:, :length], causal=True)

    module = types.ModuleType("flash_attn")
    module.flash_attn_func = flash_attn_func
    module.flash_attn_with_kvcache = flash_attn_with_kvcache
    monkeypatch.setitem(sys.modules, "flash_attn", module)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("length", [1, 3, FILLED])
@pytest.mark.parametrize("name", ["sdpa", "flash-attn"])
def test_sequence(name: str, length: int, flash_attn: None) -> None:
    query = normal(1, HEADS, length, DIM)
    keys, values = normal(2, 1, KV_HEADS, FILLED, DIM, seed=1)
    actual = BACKENDS[name].sequence(query, keys, values)
    torch.testing.assert_close(actual, reference(query, keys, values), atol=1e-6, rtol=0)


@pytest.mark.parametrize("bucket", [FILLED + 1, 12, CAPACITY])
@pytest.mark.parametrize("name", ["sdpa", "flash-attn"])
def test_token(name: str, bucket: int, flash_attn: None) -> None:
    """A token on top of what is filled: rotated, stored and attended with the rest."""
    cache = small_cache()
    cache.keys[1, :, :FILLED], cache.values[1, :, :FILLED] = normal(2, KV_HEADS, FILLED, DIM)
    qkv = normal(1, 1, (HEADS + 2 * KV_HEADS) * DIM, seed=1)
    heads = qkv.view(1, -1, 1, DIM)
    query, key, value = heads.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
    here = cache.cos[FILLED], cache.sin[FILLED]
    keys = torch.cat([cache.keys[1, None, :, :FILLED], rotate(key, *here)], dim=2)
    values = torch.cat([cache.values[1, None, :, :FILLED], value], dim=2)
    others = cache.keys[0].clone()

    actual = CachedAttention(BACKENDS[name], cache).at_position(torch.tensor([FILLED]), bucket)(
        qkv, 1
    )

    expected = reference(rotate(query, *here), keys, values).view(1, 1, -1)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(cache.keys[1, None, :, : FILLED + 1], keys)
    torch.testing.assert_close(cache.values[1, None, :, : FILLED + 1], values)
    assert torch.equal(cache.keys[0], others)


def small_cache() -> KeyValueCache:
    cache = KeyValueCache(
        2, KV_HEADS, DIM, CAPACITY, rope_theta=1e4, device=CPU, dtype=torch.float32
    )
    cache.clear()
    return cache


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch):
    """Pretend that packages are installed, or not."""

    def pretend(flash: bool, triton: bool) -> None:
        find = importlib.util.find_spec
        spec = {"flash_attn": flash or None}
        monkeypatch.setattr(
            attention.importlib.util, "find_spec", lambda name: spec.get(name, find(name))
        )
        lacking = None if triton else "no C compiler is found"
        monkeypatch.setattr(
            operators, "missing", lambda device: "no CUDA" if device == CPU else lacking
        )

    return pretend


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "flash", "triton", "best"),
    [
        (CUDA, torch.bfloat16, 128, True, True, "triton"),
        (CUDA, torch.float32, 128, True, True, "triton"),
        (CUDA, torch.bfloat16, 96, True, True, "flash-attn"),
        (CUDA, torch.bfloat16, 128, True, False, "flash-attn"),
        (CUDA, torch.float32, 128, True, False, "sdpa"),
        (CUDA, torch.bfloat16, 128, False, False, "sdpa"),
        (CPU, torch.bfloat16, 128, True, True, "sdpa"),
    ],
)
def test_best(installed, device, dtype, head_dim, flash, triton, best: str) -> None:
    installed(flash, triton)
    assert choose_backend(device, dtype, head_dim).name == best
    assert choose_backend(device, dtype, head_dim, best).name == best


@pytest.mark.parametrize(
    ("name", "device", "reason"),
    [
        ("flash-attn", CUDA, "not installed"),
        ("flash-attn", CPU, "on cpu"),
        ("triton", CUDA, "C compiler"),
        ("triton", CPU, "no CUDA"),
        ("xformers", CUDA, "expected one of triton, flash-attn, sdpa"),
    ],
)
def test_what_is_asked_for_and_absent_is_an_error(installed, name, device, reason) -> None:
    installed(flash=False, triton=False)
    with pytest.raises(ConfigurationError, match=reason):
        choose_backend(device, torch.bfloat16, 128, name)
