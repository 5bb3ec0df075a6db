"""The kernels of single-token decoding: interpreted, against PyTorch; and compiled for GPUs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kimia_infer.layers.attention import rotate, split_heads
from tests.interpreted import compiled, interpreted, needs_triton, recorded_launches

pytestmark = needs_triton

DTYPES = [torch.float32, torch.bfloat16]
NAN = float("nan")
FP8 = torch.float8_e4m3fn
LARGEST = -torch.finfo(FP8).max, torch.finfo(FP8).max


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check_add_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    from kimia_infer.layers.attention_kernels import add_rms_norm, rms_norm

    x, delta = random(2, *shape, dtype=dtype)
    weight = random(shape[-1], dtype=dtype, seed=1)
    for added in (None, delta):
        if added is None:
            total, norm = x, rms_norm(x, weight, 1e-6)
        else:
            total, norm = add_rms_norm(x, added, weight, 1e-6)
        expected = x if added is None else x + added
        assert torch.equal(total, expected)
        expected = F.rms_norm(expected.double(), shape[-1:], weight.double(), 1e-6)
        torch.testing.assert_close(norm, expected.to(dtype), **bounds(dtype))
        assert dtype is torch.float32 or (norm != expected.to(dtype)).float().mean() < 0.01


def bounds(dtype: torch.dtype) -> dict[str, float]:
    """fp32 arithmetic and one rounding, which may fall to the other of two neighbors."""
    if dtype is torch.float32:
        return {"atol": 1e-6, "rtol": 1e-6}
    return {"atol": 0.0, "rtol": torch.finfo(dtype).eps}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 3584), (1, 5, 64), (3, 96), (2, 1, 1), (7,)])
def test_add_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    interpreted(check_add_rms_norm, shape, dtype)


def check_silu_mul(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    from kimia_infer.layers.attention_kernels import silu_mul

    gate_up = 8 * random(*shape, dtype=dtype)
    gate_up.view(-1)[0] = -200.0
    gate, up = gate_up.chunk(2, dim=-1)
    expected = F.silu(gate) * up
    # The intermediate rounding may fall to a neighbor too.
    wide = {name: 2 * bound for name, bound in bounds(dtype).items()}
    torch.testing.assert_close(silu_mul(gate_up), expected, **wide)
    assert (silu_mul(gate_up) != expected).float().mean() < 0.01 or dtype is torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 2 * 1300), (1, 3, 2 * 96), (2,), (2, 2 * 512)])
def test_silu_mul(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    interpreted(check_silu_mul, shape, dtype)


START = 3


class Decoding:
    """A token of two rows and a cache that holds NaN wherever nothing has to be read."""

    def __init__(
        self,
        kv_heads: int,
        group: int,
        head_dim: int,
        position: int,
        room: int,
        dtype: torch.dtype,
        held: torch.dtype | None = None,
    ):
        self.kv_heads, self.group = kv_heads, group
        capacity = position + 1 + room
        # Behind the row in question, in places before it, is one that is at its beginning.
        self.starts, self.positions = [START, 0], [position, 1]
        places = START + capacity
        self.qkv = random(2, 1, (group + 2) * kv_heads * head_dim, dtype=dtype, seed=1)
        # One layer of several; the heads of the values lie within each position.
        self.keys = torch.full((3, kv_heads, places, head_dim), NAN, dtype=dtype)[1]
        self.values = torch.full((places, kv_heads, head_dim), NAN, dtype=dtype).transpose(0, 1)
        for start, at in zip(self.starts, self.positions, strict=True):
            filled = slice(start, start + at)
            self.keys[:, filled] = random(kv_heads, at, head_dim, dtype=dtype, seed=2)
            self.values[:, filled] = random(kv_heads, at, head_dim, dtype=dtype, seed=3)
        self.held = held or dtype
        self.keys, self.values = self.keys.to(self.held), self.values.to(self.held)
        angles = random(head_dim // 2, dtype=torch.float32, seed=4).repeat(2)
        self.cos, self.sin = torch.full((2, max(2, capacity), head_dim), NAN, dtype=dtype)
        for at in self.positions:
            self.cos[at], self.sin[at] = angles.cos(), angles.sin()

    def by_kernel(self) -> Tensor:
        from kimia_infer.layers.attention_kernels import rotate_append_attend

        tables = self.keys, self.values, self.cos, self.sin
        places = torch.tensor(self.starts), torch.tensor(self.positions)
        heads = self.kv_heads * self.group
        return rotate_append_attend(self.qkv, *tables, *places, heads, self.kv_heads)

    def by_torch(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        """Query, keys and values [1, heads, length, head_dim], the token's own included."""
        start, at = self.starts[row], self.positions[row]
        qkv = self.qkv[row : row + 1]
        query, key, value = split_heads(qkv, self.kv_heads, self.keys.shape[-1])
        query, key = (rotate(x, self.cos[at], self.sin[at]) for x in (query, key))
        filled = slice(start, start + at)
        keys, values = (x[None, :, filled].to(query.dtype) for x in (self.keys, self.values))
        key, value = (x.clamp(*LARGEST).to(self.held).to(x.dtype) for x in (key, value))
        return query, torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)


def attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    mixed = F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    return mixed.transpose(1, 2).flatten(2)


def check_attention(
    splits: int, dtype: torch.dtype, *sizes: int, held: torch.dtype | None = None
) -> None:
    from kimia_infer.layers import attention_kernels as kernels

    kernels.SPLITS, kernels.FEWEST_SPLITS = 2 * splits, 1  # shared by two rows
    decoding = Decoding(*sizes, dtype, held)
    if held is not None:  # beyond what it can hold
        decoding.qkv[0, 0, -1], decoding.qkv[0, 0, -2] = 1000.0, -1000.0
    keys, values = decoding.keys.float(), decoding.values.float()
    rows = [decoding.by_torch(row) for row in range(2)]
    for (_, *stored), start, at in zip(rows, decoding.starts, decoding.positions, strict=True):
        keys[:, start + at], values[:, start + at] = (x[0, :, -1] for x in stored)
    actual = decoding.by_kernel()
    # Stored as it is without the kernel, and nothing else is touched.
    exactly = {"atol": 0, "rtol": 0, "equal_nan": True}
    torch.testing.assert_close(decoding.keys.float(), keys, **exactly)
    torch.testing.assert_close(decoding.values.float(), values, **exactly)
    # In bf16 weights and result are rounded.
    error = 1e-5 if dtype is torch.float32 else torch.finfo(dtype).eps
    for row, expected in enumerate(rows):
        bound = error * expected[2].abs().max().item()
        reference = attend(*(x.double() for x in expected))
        torch.testing.assert_close(actual[row : row + 1].double(), reference, atol=bound, rtol=0)
    assert actual.dtype is dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
@pytest.mark.parametrize(("kv_heads", "group"), [(1, 1), (2, 2), (1, 7), (1, 17)])
def test_attention_of_any_shape(
    kv_heads: int, group: int, head_dim: int, dtype: torch.dtype, long: bool
) -> None:
    if not long and (head_dim >= 64) != (dtype is torch.bfloat16):
        pytest.skip("each size in one dtype, the served one in bfloat16; the other with --long")
    interpreted(check_attention, 8, dtype, kv_heads, group, head_dim, 300, 5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("position", [0, 1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257])
@pytest.mark.parametrize("room", [0, 70])
def test_attention_around_boundaries(position: int, room: int, dtype: torch.dtype) -> None:
    """Blocks are of 32 or 64 positions and two splits take one or several of them."""
    interpreted(check_attention, 2, dtype, 1, 2, 16, position, room)


def check_narrow(splits: int, dtype: torch.dtype, *sizes: int) -> None:
    check_attention(splits, dtype, *sizes, held=FP8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("position", [0, 1, 63, 64, 300])
@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), [(2, 2, 16), (1, 7, 128)])
def test_attention_with_a_cache_in_8_bits(
    kv_heads: int, group: int, head_dim: int, position: int, dtype: torch.dtype
) -> None:
    interpreted(check_narrow, 4, dtype, kv_heads, group, head_dim, position, 5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_full_size(dtype: torch.dtype) -> None:
    interpreted(check_attention, 32, dtype, 4, 7, 128, 2100, 10)


@settings(max_examples=settings.default.max_examples // 5)
@given(
    splits=st.sampled_from([1, 2, 4]),
    dtype=st.sampled_from(DTYPES),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 9),
    head_dim=st.sampled_from([16, 32, 64]),
    position=st.integers(0, 600),
    room=st.integers(0, 80),
)
def test_attention_of_random_sizes(splits: int, dtype: torch.dtype, **sizes: int) -> None:
    interpreted(check_attention, splits, dtype, *sizes.values())


def check_as_precise_as_torch() -> None:
    decoding = Decoding(2, 7, 64, 700, 0, torch.bfloat16)
    expected = decoding.by_torch(0)
    reference = attend(*(x.double() for x in expected))
    found = decoding.by_kernel()[:1], attend(*expected)
    errors = [(x.double() - reference).square().mean() for x in found]
    assert errors[0] < 1.2 * errors[1]


def test_as_precise_as_torch() -> None:
    interpreted(check_as_precise_as_torch)


def check_refusal(head_dim: int) -> None:
    decoding = Decoding(1, 1, head_dim, 3, 0, torch.float32)
    with pytest.raises(ValueError, match=rf"head_dim must be a power of two.*{head_dim}"):
        decoding.by_kernel()


@pytest.mark.parametrize("head_dim", [8, 24, 80])
def test_other_head_sizes_are_refused(head_dim: int) -> None:
    interpreted(check_refusal, head_dim)


def decode_at_full_size(dtype: torch.dtype, rows: int = 1) -> None:
    from kimia_infer.layers.attention_kernels import (
        add_rms_norm,
        rms_norm,
        rotate_append_attend,
        silu_mul,
    )

    x = torch.empty(1, 1, 3584, dtype=dtype)
    rms_norm(x, x[0, 0], 1e-6)
    add_rms_norm(x, x, x[0, 0], 1e-6)
    silu_mul(torch.empty(1, 1, 2 * 18944, dtype=dtype))
    keys, values = torch.empty(2, 4, 7500, 128, dtype=dtype)
    angles = torch.empty(7500, 128, dtype=dtype)
    qkv = torch.empty(rows, 1, 36 * 128, dtype=dtype)
    rotate_append_attend(
        qkv, keys, values, angles, angles, *torch.empty(2, rows, dtype=torch.int64), 28, 4
    )


def attend_in_8_bits(dtype: torch.dtype, rows: int = 8) -> None:
    from kimia_infer.layers.attention_kernels import rotate_append_attend

    keys, values = torch.empty(2, 4, 7500, 128, dtype=FP8)
    angles = torch.empty(7500, 128, dtype=dtype)
    qkv = torch.empty(rows, 1, 36 * 128, dtype=dtype)
    rotate_append_attend(
        qkv, keys, values, angles, angles, *torch.empty(2, rows, dtype=torch.int64), 28, 4
    )


@pytest.mark.parametrize("capability", [89, 90])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cache_in_8_bits_is_compiled(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, capability: int, long: bool
) -> None:
    """For the devices that have e4m3."""
    if not long and (dtype, capability) not in [(torch.float32, 89), (torch.bfloat16, 90)]:
        pytest.skip("compiling takes seconds; every combination runs with --long")
    launches = recorded_launches(monkeypatch, lambda: attend_in_8_bits(dtype))
    for launch in launches:
        kernel = compiled(launch, capability)
        assert "tf32" not in kernel.asm["ptx"]
        assert kernel.metadata.shared <= 99 * 1024
        if launch[0].__name__ == "_attend_split":
            assert "e4m3x2" in kernel.asm["ptx"]


def decode_at_smallest_size(dtype: torch.dtype) -> None:
    """Sizes of 1, which Triton makes constants."""
    from kimia_infer.layers.attention_kernels import (
        add_rms_norm,
        rms_norm,
        rotate_append_attend,
        silu_mul,
    )

    one = torch.empty(1, dtype=dtype)
    rms_norm(one, one, 1e-6)
    add_rms_norm(one, one, one, 1e-6)
    silu_mul(torch.empty(2, dtype=dtype))
    vectors = torch.empty(1, 1, 16, dtype=dtype)
    position = torch.empty(1, dtype=torch.int64)
    qkv = torch.empty(1, 1, 48, dtype=dtype)
    rotate_append_attend(qkv, vectors, vectors, vectors[0], vectors[0], position, position, 1, 1)


COMPILED = [
    (decode_at_full_size, torch.bfloat16, 80),
    (decode_at_full_size, torch.bfloat16, 90),
    (decode_at_full_size, torch.float32, 80),
    (decode_at_smallest_size, torch.float32, 90),
]
"""Without ``--long``: what is served, and the other sizes and dtypes once."""


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("work", [decode_at_full_size, decode_at_smallest_size])
def test_compiled(
    monkeypatch: pytest.MonkeyPatch, work, dtype: torch.dtype, capability: int, long: bool
) -> None:
    if not long and (work, dtype, capability) not in COMPILED:
        pytest.skip("compiling takes seconds; every combination runs with --long")
    launches = recorded_launches(monkeypatch, lambda: work(dtype))
    assert {kernel.__name__ for kernel, _ in launches} == {
        "_add_rms_norm",
        "_silu_mul",
        "_attend_split",
        "_combine_splits",
    }
    for launch in launches:
        kernel = compiled(launch, capability)
        assert "tf32" not in kernel.asm["ptx"]
        assert kernel.metadata.shared <= 99 * 1024  # of the smallest GPU with this instruction set
