"""The kernels of quantized matrices: interpreted, against PyTorch; and compiled for GPUs."""

from __future__ import annotations

import functools
import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F

from kimia_infer.layers.quantization import STORAGES, QuantizedLinear, quantize
from tests.interpreted import compiled, interpreted, needs_triton, recorded_launches

pytestmark = needs_triton

DTYPES = [torch.float32, torch.bfloat16]
CAPABILITIES = {"int8": (80, 90), "fp8": (89, 90), "int4": (80, 90)}


def random_layer(
    storage: str, rows: int, columns: int, bias: bool, dtype: torch.dtype
) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(rows + columns)
    layer = QuantizedLinear(columns, rows, bias, STORAGES[storage])
    held = quantize(torch.randn(rows, columns, generator=generator), STORAGES[storage])
    layer.weight.data, layer.scale.data = held["weight"], held["scale"]
    if bias:
        layer.bias.data = torch.randn(rows, generator=generator).to(dtype)
    return layer


def check_product(
    storage: str, rows: int, columns: int, bias: bool, dtype: torch.dtype, leading: tuple[int, ...]
) -> None:
    # A byte's values are rounded with their scale where several vectors are multiplied.
    rounded = dtype if storage == "int4" and math.prod(leading) > 1 else torch.float64
    layer = random_layer(storage, rows, columns, bias, dtype)
    weight = layer.dequantized(rounded).double()
    x = torch.randn(*leading, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        found = layer(x)
    exact = F.linear(x.double(), weight, None if layer.bias is None else layer.bias.double())
    assert found.dtype is dtype and found.shape == (*leading, rows)
    # Terms are summed in fp32 and the sum is rounded once.
    rounding = 0.0 if dtype is torch.float32 else torch.finfo(dtype).eps / 2
    torch.testing.assert_close(
        found.double(), exact, rtol=1.01 * rounding + 1e-6, atol=3e-7 * columns
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    ("rows", "columns", "bias"),
    [(1, 32, False), (3, 64, True), (4, 1024, False), (9, 1056, True), (6, 2080, True)],
)
def test_product(storage: str, rows: int, columns: int, bias: bool, dtype: torch.dtype) -> None:
    """Whole blocks and parts of them, of rows and of columns."""
    interpreted(check_product, storage, rows, columns, bias, dtype, (1, 1))


@pytest.mark.parametrize("storage", ["int8", "fp8"])
def test_rows_of_any_length(storage: str) -> None:
    interpreted(check_product, storage, 5, 77, True, torch.bfloat16, ())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    ("count", "rows", "columns", "bias"),
    [(2, 32, 128, False), (16, 40, 160, True), (17, 33, 416, True), (32, 7, 64, False)],
)
def test_products(
    storage: str, count: int, rows: int, columns: int, bias: bool, dtype: torch.dtype
) -> None:
    """A token of each of several requests: whole tiles and parts of them."""
    interpreted(check_product, storage, rows, columns, bias, dtype, (count, 1))


def products_at(hidden: int, inner: int, dtype: torch.dtype, storage: str, count: int) -> None:
    for rows, columns, bias in ((inner, hidden, False), (hidden, inner, False), (48, hidden, True)):
        with torch.device("meta"):
            layer = QuantizedLinear(columns, rows, bias, STORAGES[storage])
        values = {n: torch.empty(p.shape, dtype=p.dtype) for n, p in layer.named_parameters()}
        from kimia_infer.layers.quantized_kernels import matrix_vector

        given = values.get("bias")
        given = None if given is None else given.to(dtype)
        matrix_vector(
            torch.empty(count, 1, columns, dtype=dtype), values["weight"], values["scale"], given
        )


PUBLISHED_SIZES, SMALL = (3584, 2 * 18944), (32, 96)
# One vector has a kernel of its own, up to 16 share a tile, more have a larger one. What is served
# is bfloat16; the others tell sizes and dtypes from each other, and are of int8.
SAMPLE = [
    (1, PUBLISHED_SIZES, torch.bfloat16),
    (1, SMALL, torch.float32),
    (8, SMALL, torch.float32),
    (32, PUBLISHED_SIZES, torch.bfloat16),
]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    ("count", "sizes", "dtype"), itertools.product([1, 8, 32], [PUBLISHED_SIZES, SMALL], DTYPES)
)
def test_compiled(
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    sizes: tuple[int, int],
    storage: str,
    dtype: torch.dtype,
    long: bool,
) -> None:
    """For the published sizes and for small ones, on every GPU that can have the scheme."""
    sampled = (count, sizes, dtype) in SAMPLE and (sizes is PUBLISHED_SIZES or storage == "int8")
    if not sampled and not long:
        pytest.skip("compiling takes seconds; every combination runs with --long")
    work = functools.partial(products_at, *sizes, dtype, storage, count)
    launches = recorded_launches(monkeypatch, work)
    start = "" if count == 1 else "_vectors"
    assert {kernel.__name__ for kernel, _ in launches} == {
        f"{start}_by_groups" if storage == "int4" else f"{start}_by_rows"
    }
    assert len(launches) == 3
    for launch in launches:
        for capability in CAPABILITIES[storage]:
            kernel = compiled(launch, capability)
            assert kernel.metadata.shared <= 99 * 1024
            ptx = kernel.asm["ptx"]
            if sizes is PUBLISHED_SIZES:  # a thread loads 16 bytes of weights at a time
                assert "ld.global.v4.b32" in ptx or re.search(r"cp\.async.*, 0x10, ", ptx)
            if count > 1 and dtype is torch.bfloat16:
                assert "mma" in ptx
