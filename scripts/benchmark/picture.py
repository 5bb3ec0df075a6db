"""A picture of how a model bears many clients, from the results of a benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from matplotlib.figure import Figure

PANELS = {
    "decode steps a second, of all": "steps/s",
    "first sound, p95, ms": "first sound p95, ms",
    "answers that run dry, %": "run dry, %",
}
"""Columns that are shown, by their title."""

STYLES = {"closed": "-", "open": "--"}


def figure_of(rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> Figure:
    """``rows`` of :func:`scripts.benchmark.concurrency.measure`; ``about`` is the machine."""
    ways = dict.fromkeys(row["through"] for row in rows)
    figure = Figure(figsize=(5 * len(PANELS), 4.2), layout="constrained")
    for axes, (title, column) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for (index, way), (loop, style) in product(enumerate(ways), STYLES.items()):
            points = [
                (row["clients"], row[column])
                for row in rows
                if (row["through"], row["loop"]) == (way, loop) and row[column] is not None
            ]
            if points:
                label = f"{way}, {loop} loop"
                axes.plot(*zip(*points, strict=True), f"o{style}C{index}", label=label)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(title=title, xlabel="clients", ylim=(0, None))
    axes.legend()
    names = ("model", "device", "dtype", "date")
    figure.suptitle("; ".join(str(about[name]) for name in names if name in about), fontsize=9)
    return figure
