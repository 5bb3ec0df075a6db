"""Functions recorded by shape, with a stand-in for CUDA graphs."""

from __future__ import annotations

import torch

from kimia_infer.utils.graphs import Direct, Recorded
from tests.traced import TracedGraphs


def test_the_first_shapes_are_recorded_once() -> None:
    graphs = TracedGraphs(torch.device("cpu"))
    recorded = Recorded(lambda x: x.sin() * x.shape[0], graphs, shapes=2)
    for turn in range(3):
        for length in (3, 5, 7):
            x = torch.randn(length)
            torch.testing.assert_close(recorded(x), x.sin() * length)
        assert graphs.recorded == 2 and graphs.replayed == 2 * (turn + 1)


def test_results_are_not_overwritten_by_later_ones() -> None:
    recorded = Recorded(torch.neg, TracedGraphs(torch.device("cpu")), shapes=1)
    with torch.inference_mode():
        first, second = recorded(torch.ones(2)), recorded(torch.zeros(2))
    third = recorded(torch.full((2,), 3.0))
    assert first.tolist() == [-1, -1] and second.tolist() == [0, 0] and third.tolist() == [-3, -3]


def test_nothing_is_recorded_without_graphs() -> None:
    calls = []

    def function(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        return x

    x = torch.ones(1)
    assert Recorded(function, Direct(), shapes=1)(x) is x and calls == [x]
