"""The choice of an attention backend, and that both see the same tensors the same way."""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch
from torch import Tensor

from kimia_infer.language_model import attention


def reference(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Written out per head: the last queries of a sequence, causal, grouped keys."""
    group = query.shape[1] // keys.shape[1]
    length, total = query.shape[2], keys.shape[2]
    out = torch.empty_like(query)
    for head in range(query.shape[1]):
        for row in range(length):
            seen = total - length + row + 1
            scores = keys[0, head // group, :seen] @ query[0, head, row]
            weights = torch.softmax(scores / math.sqrt(query.shape[3]), 0)
            out[0, head, row] = weights @ values[0, head // group, :seen]
    return out


@pytest.fixture
def tensors() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(1, 6, 7, 8, generator=generator),
        torch.randn(2, 1, 2, 7, 8, generator=generator),
    )


@pytest.mark.parametrize("length", [1, 3, 7])
def test_sdpa(tensors: tuple[Tensor, Tensor], length: int) -> None:
    query, (keys, values) = tensors
    query = query[:, :, -length:]
    actual = attention.causal_attention(query, keys, values)
    torch.testing.assert_close(actual, reference(query, keys, values), atol=1e-6, rtol=0)


@pytest.mark.parametrize("length", [1, 3, 7])
def test_flash_attn_gets_its_layout(
    tensors: tuple[Tensor, Tensor], length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in with flash-attn's signature: [batch, length, heads, head_dim], causal."""

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        assert causal
        return reference(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    module = types.ModuleType("flash_attn")
    module.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    query, (keys, values) = tensors
    query = query[:, :, -length:]
    expected = attention.causal_attention(query, keys, values)
    monkeypatch.setattr(attention, "backend", lambda device, dtype: "flash-attn")
    actual = attention.causal_attention(query, keys, values)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)


def test_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(attention, "_flash_installed", lambda: True)
    assert attention.backend(cuda, torch.bfloat16) == "flash-attn"
    assert attention.backend(cuda, torch.float32) == "sdpa"
    assert attention.backend(cpu, torch.bfloat16) == "sdpa"
    monkeypatch.setattr(attention, "_flash_installed", lambda: False)
    assert attention.backend(cuda, torch.bfloat16) == "sdpa"
