"""The choice of an attention backend, and that all see the same tensors the same way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kimia_infer.layers import operators
from kimia_infer.layers.attention import (
    BACKENDS,
    CachedAttention,
    KeyValueCache,
    choose_backend,
    rotate,
    split_heads,
)
from kimia_infer.utils.errors import ConfigurationError
from tests.layers.helpers import reference

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HEADS, KV_HEADS, DIM, FILLED, POSITIONS = 6, 2, 8, 7, 16
ROWS = (HEADS + 2 * KV_HEADS) * DIM


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("length", [1, 3, FILLED])
def test_sequence(length: int) -> None:
    """The last tokens of what is filled, of a request whose places begin further on."""
    cache, start, before = small_cache(), 5, FILLED - length
    old = normal(2, KV_HEADS, before, DIM)
    cache.store(1, slice(start, start + before), old[0], old[1])
    qkv = normal(1, length, ROWS, seed=1)
    query, key, value = split_heads(qkv, KV_HEADS, DIM)
    here = cache.cos[before:FILLED], cache.sin[before:FILLED]
    keys = torch.cat([old[:1], rotate(key, *here)], dim=2)
    values = torch.cat([old[1:], value], dim=2)
    others = cache.keys[0].clone()
    actual = CachedAttention(BACKENDS["sdpa"], cache).sequence(start, before)(qkv, 1)
    expected = reference(rotate(query, *here), keys, values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(cache.read(1, start, start + FILLED), (keys, values))
    assert torch.equal(cache.keys[0], others)


@pytest.mark.parametrize("bucket", [FILLED + 1, 12, POSITIONS])
@pytest.mark.parametrize("recorded", [False, True])
def test_tokens(recorded: bool, bucket: int) -> None:
    """A token of every row on top of what is filled: rotated, stored and attended with it."""
    cache = small_cache()
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    starts, positions = [20, 0, 9], [3, FILLED, 0]
    qkv = normal(3, 1, ROWS, seed=1)
    expected = []
    for row, (start, position) in enumerate(zip(starts, positions, strict=True)):
        old = normal(2, KV_HEADS, position, DIM, seed=row)
        cache.store(1, slice(start, start + position), old[0], old[1])
        query, key, value = split_heads(qkv[row : row + 1], KV_HEADS, DIM)
        here = cache.cos[position], cache.sin[position]
        keys = torch.cat([old[:1], rotate(key, *here)], dim=2)
        values = torch.cat([old[1:], value], dim=2)
        expected.append(
            (reference(rotate(query, *here), keys, values).view(1, 1, -1), keys, values)
        )
    attention = CachedAttention(BACKENDS["sdpa"], cache)
    if recorded:
        given = torch.tensor(starts), torch.tensor(positions)
        actual = attention.recorded_tokens(*given, bucket)(qkv, 1)
    else:
        actual = attention.tokens(starts, positions)(qkv, 1)
    for row, (mixed, keys, values) in enumerate(expected):
        torch.testing.assert_close(actual[row : row + 1], mixed, atol=1e-6, rtol=0)
        end = starts[row] + positions[row] + 1
        torch.testing.assert_close(cache.read(1, starts[row], end), (keys, values))
    assert cache.keys[0].isnan().all()


def small_cache() -> KeyValueCache:
    cache = KeyValueCache(
        2, KV_HEADS, DIM, 24, POSITIONS, rope_theta=1e4, device=CPU, dtype=torch.float32
    )
    cache.keys.zero_()  # what was in the memory before may be NaN, which equals nothing
    cache.values.zero_()
    return cache


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch):
    """Pretend that what Triton needs is there, or not."""

    def pretend(triton: bool) -> None:
        lacking = None if triton else "no C compiler is found"
        monkeypatch.setattr(
            operators, "missing", lambda device: "no CUDA" if device == CPU else lacking
        )

    return pretend


@pytest.mark.parametrize(
    ("device", "head_dim", "triton", "best"),
    [
        (CUDA, 128, True, "triton"),
        (CUDA, 96, True, "sdpa"),
        (CUDA, 128, False, "sdpa"),
        (CPU, 128, True, "sdpa"),
    ],
)
def test_best(installed, device, head_dim, triton, best: str) -> None:
    installed(triton)
    assert choose_backend(device, head_dim).name == best
    assert choose_backend(device, head_dim, best).name == best


@pytest.mark.parametrize(
    ("name", "device", "reason"),
    [
        ("triton", CUDA, "C compiler"),
        ("triton", CPU, "no CUDA"),
        ("flash-attn", CUDA, "expected one of triton, sdpa, found 'flash-attn'"),
    ],
)
def test_what_is_asked_for_and_absent_is_an_error(installed, name, device, reason) -> None:
    installed(triton=False)
    with pytest.raises(ConfigurationError, match=reason):
        choose_backend(device, 128, name)
