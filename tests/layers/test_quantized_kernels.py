"""The kernels of quantized matrices: interpreted, against PyTorch; and compiled for GPUs."""

from __future__ import annotations

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
) -> tuple[QuantizedLinear, torch.Tensor]:
    """A layer without values in float64 beside it, and what it holds, in float64."""
    generator = torch.Generator().manual_seed(rows + columns)
    layer = QuantizedLinear(columns, rows, bias, STORAGES[storage])
    held = quantize(torch.randn(rows, columns, generator=generator), STORAGES[storage])
    layer.weight.data, layer.scale.data = held["weight"], held["scale"]
    if bias:
        layer.bias.data = torch.randn(rows, generator=generator).to(dtype)
    return layer, layer.dequantized(torch.float64)


def check_product(
    storage: str, rows: int, columns: int, bias: bool, dtype: torch.dtype, leading: tuple[int, ...]
) -> None:
    layer, weight = random_layer(storage, rows, columns, bias, dtype)
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


def products_at(hidden: int, inner: int, dtype: torch.dtype, storage: str) -> None:
    for rows, columns, bias in ((inner, hidden, False), (hidden, inner, False), (48, hidden, True)):
        with torch.device("meta"):
            layer = QuantizedLinear(columns, rows, bias, STORAGES[storage])
        values = {n: torch.empty(p.shape, dtype=p.dtype) for n, p in layer.named_parameters()}
        from kimia_infer.layers.quantized_kernels import matrix_vector

        given = values.get("bias")
        given = None if given is None else given.to(dtype)
        matrix_vector(
            torch.empty(1, 1, columns, dtype=dtype), values["weight"], values["scale"], given
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("sizes", [(3584, 2 * 18944), (32, 96)])
def test_compiled(monkeypatch: pytest.MonkeyPatch, sizes, storage: str, dtype: torch.dtype) -> None:
    """For the published sizes and for small ones, on every GPU that can have the scheme."""
    launches = recorded_launches(monkeypatch, lambda: products_at(*sizes, dtype, storage))
    assert {kernel.__name__ for kernel, _ in launches} == {
        "_by_groups" if storage == "int4" else "_by_rows"
    }
    assert len(launches) == 3
    for launch in launches:
        for capability in CAPABILITIES[storage]:
            kernel = compiled(launch, capability)
            assert kernel.metadata.shared <= 99 * 1024
            if sizes[0] == 3584:  # a thread loads 16 bytes of weights at a time
                assert "ld.global.v4.b32" in kernel.asm["ptx"]
