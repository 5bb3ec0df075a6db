"""Checks of a device: each compares results and gives the largest error and its limit."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from kimia_infer.utils.graphs import Direct, Graphs, graphs_for
from scripts.benchmark.report import Table

MakeGraphs = Callable[[torch.device], Graphs]


@dataclass(frozen=True)
class Place:
    """Where checks run; ``make_graphs`` is how work is launched there."""

    device: torch.device
    make_graphs: MakeGraphs = graphs_for

    def launches(self) -> dict[str, MakeGraphs]:
        """How work can be launched here, by name."""
        found: dict[str, MakeGraphs] = {"eager": lambda device: Direct()}
        if self.make_graphs(self.device).captures:
            found["recorded graphs"] = self.make_graphs
        return found


@dataclass(frozen=True)
class Found:
    """The largest error of a check, and the most that it may be; None if it cannot be made."""

    error: float | None
    limit: float
    note: str = ""


Findings = Iterator[tuple[str, Found]]
Check = Callable[[], Findings]


def check_all(title: str, checks: Mapping[str, Check]) -> Table:
    """Make every check, by component, even if others fail."""
    # Products of float32 have to be those of float32.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    table = Table(title, [])
    for component, check in checks.items():
        try:
            for name, found in check():
                wrong = found.error is not None and not found.error <= found.limit
                result = "WRONG" if wrong else "ok" if found.error is not None else found.note
                table.rows.append(
                    {"component": component, "check": name, "largest error": found.error}
                    | {"limit": found.limit, "result": result}
                )
                if wrong:
                    error = f"{found.error:.3g} is above {found.limit:.3g}"
                    table.problems.append(f"{component}, {name}: {error}")
        except Exception as error:
            traceback.print_exc()
            table.rows.append({"component": component, "check": "", "result": "failed"})
            table.problems.append(f"{component}: {type(error).__name__}: {error}")
    return table


def skipped(error: ValueError) -> str:
    return f"skipped: {str(error).partition(', ')[2].partition(';')[0]}"
