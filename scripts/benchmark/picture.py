"""Pictures of benchmarks: how a model bears many clients, and the stages of a clone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

PANELS = {
    "decode steps a second, of all": "steps/s",
    "first sound, p95, ms": "first sound p95, ms",
    "answers that run dry, %": "run dry, %",
}
"""Columns that are shown, by their title."""

COLORS = colormaps["tab20"]
APART = ("load", "total")
"""Stages of a clone that are no part of its total."""

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
    figure.suptitle(_machine(about), fontsize=9)
    return figure


def stages_of(rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> Figure:
    """``rows`` of :func:`scripts.benchmark.editx.stages`, the share of each stage in the total."""
    total = next(row for row in rows if row["stage"] == "total")
    columns = [name for name, value in total.items() if name != "stage" and value]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots()
    bars = list(dict.fromkeys(row["stage"] for row in rows if row["stage"] not in APART))
    left = dict.fromkeys(columns, 0.0)
    for index, stage in enumerate(bars):
        row = next(row for row in rows if row["stage"] == stage)
        for place, column in enumerate(columns):
            if row.get(column) is not None:
                share = 100 * row[column] / total[column]
                axes.barh(place, share, left=left[column], color=COLORS(index), label=stage)
                left[column] += share
    for place, column in enumerate(columns):
        axes.text(101, place, f"{total[column]:.2f} s", va="center")
    axes.set_yticks(range(len(columns)), columns)
    shown = {text: bar for bar, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    axes.legend(shown.values(), shown, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1))
    axes.set(xlabel="% of the total", xlim=(0, 112))
    axes.invert_yaxis()
    figure.suptitle(_machine(about), fontsize=9)
    return figure


def _machine(about: Mapping[str, Any]) -> str:
    names = ("model", "device", "dtype", "date")
    return "; ".join(str(about[name]) for name in names if name in about)


FIGURES = {"concurrency": figure_of, "editx-stages": stages_of}
"""What is drawn of the first table of a measurement."""
