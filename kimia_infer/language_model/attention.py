"""The one place that chooses how attention is computed.

flash-attn is used where it is installed and supports the device and dtype, PyTorch's scaled
dot product attention (SDPA) otherwise. Both read grouped keys and values as they are stored.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor


@functools.cache
def _flash_installed() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def backend(device: torch.device, dtype: torch.dtype) -> str:
    """Name of the implementation used for tensors of this device and dtype."""
    supported = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    return "flash-attn" if supported and _flash_installed() else "sdpa"


def causal_attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of the last positions of a sequence over all of it.

    query [batch, heads, length, head_dim] stands at the end of keys and values
    [batch, kv_heads, total, head_dim]; returns the shape of query. Each query sees the keys
    up to its own position. Scale 1/sqrt(head_dim).
    """
    length, total = query.shape[2], keys.shape[2]
    if backend(query.device, query.dtype) == "flash-attn":
        from flash_attn import flash_attn_func

        # flash-attn aligns the causal mask to the end of the keys, as wanted here.
        out = flash_attn_func(
            query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), causal=True
        )
        return out.transpose(1, 2)
    mask = None
    if 1 < length < total:
        mask = torch.ones(length, total, dtype=torch.bool, device=query.device)
        mask = mask.tril(total - length)
    return F.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, is_causal=length == total > 1, enable_gqa=True
    )
