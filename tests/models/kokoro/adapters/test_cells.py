"""Cells in both directions: rows of a batch are as alone, and they see both sides."""

from __future__ import annotations

import pytest
import torch

from kimia_infer.models.kokoro.adapters.cells import CELLS, LTC, CellPath, CfC, reverse
from kimia_infer.models.kokoro.layers import Rows

LENGTHS = torch.tensor([40, 3, 33])  # a Mamba block computes 32 positions together


def made(cell: str) -> tuple[CellPath, torch.Tensor]:
    torch.manual_seed(0)
    return CellPath(cell, 10, 16, 12), torch.randn(3, 40, 10)


def test_rows_are_reversed_up_to_their_end() -> None:
    x = torch.arange(8).view(2, 4, 1)
    assert reverse(x, Rows(torch.tensor([3, 4])))[..., 0].tolist() == [[2, 1, 0, 3], [7, 6, 5, 4]]
    assert reverse(x, Rows())[..., 0].tolist() == [[3, 2, 1, 0], [7, 6, 5, 4]]


@pytest.mark.parametrize("cell", CELLS)
def test_rows_of_a_batch_are_as_alone(cell: str) -> None:
    path, x = made(cell)
    together = path(x, Rows(LENGTHS))
    for row, length in enumerate(LENGTHS.tolist()):
        alone = path(x[row : row + 1, :length], Rows())
        torch.testing.assert_close(together[row, :length], alone[0], atol=1e-6, rtol=1e-5)
        assert not together[row, length:].any()


@pytest.mark.parametrize("cell", CELLS)
def test_every_output_depends_on_both_sides(cell: str) -> None:
    path, x = made(cell)
    before = path(x, Rows())
    for place in (15, 25):
        changed = x.clone()
        changed[:, place] += 5
        assert (path(changed, Rows())[:, 20] - before[:, 20]).abs().max() > 1e-4


def test_cfc_by_its_equations() -> None:
    """The published cell with both terms of its gate, step by step, of one direction."""
    torch.manual_seed(1)
    cell, x = CfC(4), torch.randn(2, 1, 5, 4)
    found = cell(x)
    h = torch.zeros(4)
    for step in range(5):
        joined = torch.cat([x[1, 0, step], h])
        weight = torch.cat([cell.enter[1], cell.recur[1]])
        z = 1.7159 * torch.tanh(0.666 * (joined @ weight + cell.bias[1, 0]))
        first, second, time = (z @ cell.heads[1] + cell.heads_bias[1, 0]).chunk(3)
        gate = torch.sigmoid(1.0 * time)
        h = torch.tanh(first) * (1 - gate) + gate * torch.tanh(second)
        torch.testing.assert_close(found[1, 0, step], h)


def test_ltc_approaches_the_solution_of_its_equation() -> None:
    """With a constant input and no recurrence, the state follows a known exponential."""
    torch.manual_seed(2)
    cell, x = LTC(3), torch.randn(3)
    with torch.no_grad():
        cell.recur.zero_()
    found = cell(x.expand(2, 1, 3, 3))[0, 0]
    flow = torch.sigmoid(x @ cell.enter[0] + cell.bias[0, 0])
    rate = torch.exp(cell.log_leak[0, 0]) + flow
    for step in range(3):
        exact = flow * cell.target[0, 0] / rate * (1 - torch.exp(-rate * (step + 1)))
        torch.testing.assert_close(found[step], exact, atol=0.02, rtol=0)
