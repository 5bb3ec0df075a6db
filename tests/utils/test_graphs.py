"""Functions recorded by shape, with a stand-in for CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kimia_infer.utils.graphs import Direct, Recorded
from tests.traced import TracedGraphs


def test_given_shapes_are_recorded_once() -> None:
    graphs = TracedGraphs(torch.device("cpu"))
    recorded = Recorded(lambda x: x.sin() * x.shape[0], graphs)
    for turn in range(3):
        recorded.record(torch.zeros(3))
        recorded.record(torch.zeros(5))
        for length in (3, 5, 7):
            x = torch.randn(length)
            torch.testing.assert_close(recorded(x), x.sin() * length)
        assert graphs.recorded == 2 and graphs.replayed == 2 * (turn + 1)


def test_results_are_not_overwritten_by_later_ones() -> None:
    recorded = Recorded(torch.neg, TracedGraphs(torch.device("cpu")))
    recorded.record(torch.zeros(2))
    with torch.inference_mode():
        first, second = recorded(torch.ones(2)), recorded(torch.zeros(2))
    third = recorded(torch.full((2,), 3.0))
    assert first.tolist() == [-1, -1] and second.tolist() == [0, 0] and third.tolist() == [-3, -3]


@torch.inference_mode()
def test_a_recording_is_of_operations_on_the_same_memory() -> None:
    """As for CUDA graphs: Python runs once, tensors stay where they are, views follow them."""
    state, given, steps = torch.zeros(2, 3), torch.ones(3), []

    def work() -> None:
        steps.append(len(steps))
        row = state[1]
        row += given * len(steps)  # a view of what is kept, changed in place
        low, high = torch.cat([row, given]).view(2, 3).amin(0), torch.empty(3).fill_(7.0)
        high.clamp_(max=row.sort().values[-1] + torch.arange(3))
        state[0].copy_(high - low)

    launch = TracedGraphs(torch.device("cpu")).record(work)
    assert steps == [0, 1] and state[1].tolist() == [3, 3, 3]  # 1 once, 2 while recording
    given.fill_(4.0)
    launch()
    assert steps == [0, 1]
    assert state.tolist() == [[7 - 4] * 3, [3 + 2 * 4] * 3]


@pytest.mark.parametrize("read", [Tensor.item, bool, Tensor.nonzero])
def test_a_value_cannot_be_read_while_recording(read: Callable[[Tensor], object]) -> None:
    with pytest.raises(RuntimeError, match="reads a value"):
        TracedGraphs(torch.device("cpu")).record(lambda: (read(torch.ones(1) * 2), None)[1])


def test_nothing_is_recorded_without_graphs() -> None:
    calls = []

    def function(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        return x

    x = torch.ones(1)
    recorded = Recorded(function, Direct())
    recorded.record(x)
    assert recorded(x) is x and calls == [x]
