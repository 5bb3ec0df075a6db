"""The checks of a device, made on the CPU, and with faults."""

from __future__ import annotations

import torch

from scripts.benchmark import fast_paths, references
from scripts.benchmark.checks import Findings, Found, Place, check_all
from scripts.benchmark.sizes import SIZES
from tests.interpreted import interpreted, needs_triton
from tests.traced import FixedShapes

CPU = torch.device("cpu")


def test_recordings_on_the_cpu() -> None:
    checks = references.checks(Place(CPU))
    table = check_all("References", checks)
    assert not table.problems
    for component in checks:
        results = [row["result"] for row in table.rows if row["component"] == component]
        assert "ok" in results and "WRONG" not in results
    found = {(row["component"], row["check"]): row["largest error"] for row in table.rows}
    assert found["token loop", "20 runs, eager"] == 0
    assert 0 < found["language model", "steps, sdpa"] < 1e-4


def test_recordings_with_recorded_graphs() -> None:
    found = dict(references.batched(Place(CPU, FixedShapes)))
    assert found.keys() == {
        "3 answers side by side, eager",
        "3 answers side by side, recorded graphs",
    }
    assert all(check.error == 0 for check in found.values())


def test_fast_paths_that_a_cpu_lacks_are_skipped() -> None:
    table = check_all("Fast paths", fast_paths.checks(Place(CPU), SIZES["tiny"]))
    assert not table.problems
    assert all(row["result"].startswith("skipped: ") for row in table.rows)


def test_recorded_graphs_are_compared() -> None:
    found = dict(fast_paths.graphs(Place(CPU, FixedShapes), SIZES["tiny"]))
    assert [check.error for check in found.values()] == [0, 0]


def kernels_on_the_cpu() -> dict[str, Found]:
    return dict(fast_paths.kernels(Place(CPU), SIZES["tiny"], ["int4"], ["none"], length=4))


@needs_triton
def test_kernels_on_the_cpu() -> None:
    """Interpreted, as they would be checked on a GPU."""
    found = interpreted(kernels_on_the_cpu)
    assert len(found) == 1
    for name, check in found.items():
        assert check.error is not None and check.error <= check.limit, (name, check)
    assert 0 < found["step, weights int4, cache none"].limit < 0.1


def test_a_difference_is_a_problem_and_a_failure_hides_no_other_check() -> None:
    def different() -> Findings:
        yield "waveform", Found(0.5, 0.1)

    def broken() -> Findings:
        yield "features", Found(0.0, 0.1)
        raise RuntimeError("an illegal memory access")

    def lacking() -> Findings:
        yield "kernel", Found(None, 0.0, "skipped: no compiler")

    checks = {"vocoder": different, "Whisper": broken, "kernels": lacking}
    table = check_all("Checks", checks)
    assert [row["result"] for row in table.rows] == [
        "WRONG", "ok", "failed", "skipped: no compiler",
    ]  # fmt: skip
    assert table.problems == [
        "vocoder, waveform: 0.5 is above 0.1",
        "Whisper: RuntimeError: an illegal memory access",
    ]


def test_not_a_number_is_wrong() -> None:
    table = check_all("Checks", {"vocoder": lambda: iter([("wave", Found(float("nan"), 1.0))])})
    assert table.problems
