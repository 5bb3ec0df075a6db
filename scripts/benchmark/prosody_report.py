"""The tables of scripts/bench_adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scripts.benchmark.prosody_figures import FRAMES, PHONEMES, TEXTS

Row = Mapping[str, Any]
Column = tuple[str, Callable[[Row], str]]


def report(prosody: Sequence[Row], sound: Sequence[Row]) -> str:
    """Markdown of all rows, a table for each question."""
    replacing = [row for row in prosody if row["task"] == "replace"]
    styled = [row for row in prosody if row["task"] == "style"]
    most = max((row["strings"] for row in styled), default=0)
    whole = [row for row in styled if row["strings"] in (0, most)]
    tables = {
        "Instead of the LSTMs, another voice": (
            replacing,
            [*LABELS, *COSTS, *agreement("unheard")],
        ),
        "A speaking style, the voice that learned it": (
            whole,
            [*LABELS, *COSTS, *agreement("short")],
        ),
        "A speaking style, another voice": (whole, [*LABELS, *agreement("unheard")]),
        "A speaking style from few sentences": (
            [row for row in styled if row["seam"] == "all"],
            [("strings", lambda row: f"{row['strings']:,}"), LABELS[0], *agreement("short")],
        ),
        "Long sentences": (
            [row for row in prosody if row["seam"] == "all" and row["strings"] in (0, most)],
            [("task", lambda row: row["task"]), LABELS[0], *by_length()],
        ),
        "Sound": (
            list(sound),
            [("task", lambda row: row["task"]), LABELS[0], *heard()],
        ),
    }
    shown = [(title, table(rows, columns)) for title, (rows, columns) in tables.items() if rows]
    return "\n".join(f"## {title}\n\n{text}\n" for title, text in shown)


def table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    lines = [[title for title, _ in columns], ["---"] * len(columns)]
    lines += [[show(row) for _, show in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


LABELS: tuple[Column, ...] = (
    ("", lambda row: row["kind"]),
    ("LSTM", lambda row: row["seam"]),
)

COSTS: tuple[Column, ...] = (
    ("parameters", lambda row: f"{row['parameters']:,}"),
    (f"CPU ms, {PHONEMES} phonemes", lambda row: f"{row['phonemes_ms']:.1f}"),
    (f"CPU ms, {FRAMES} frames", lambda row: f"{row['frames_ms']:.1f}"),
)

FIGURES = {
    "equal": ("durations equal", ".3f"),
    "within_one": ("within one frame", ".3f"),
    "length": ("total length", ".3f"),
    "cents": ("F0, cents", ".0f"),
    "voicing": ("voicing equal", ".3f"),
    "energy": ("N error", ".2f"),
}


def agreement(sentences: str, names: Sequence[str] = tuple(FIGURES)) -> list[Column]:
    return [_figure(sentences, name, FIGURES[name][0]) for name in names]


def by_length() -> list[Column]:
    names = ("equal", "length", "cents", "energy")
    return [
        _figure(sentences, name, f"{FIGURES[name][0]}, {sentences}")
        for name in names
        for sentences in TEXTS
    ]


def heard() -> list[Column]:
    columns: list[Column] = []
    for sentences in ("short", "longest"):
        columns.append(_sound(sentences, "word_errors", f"word errors, %, {sentences}", ".1f"))
        columns.append(_sound(sentences, "naturalness", f"DNSMOS, {sentences}", ".2f"))
    return columns


def _figure(sentences: str, name: str, title: str) -> Column:
    return title, lambda row: format(row[sentences][name], FIGURES[name][1])


def _sound(sentences: str, name: str, title: str, form: str) -> Column:
    return title, lambda row: format(row[sentences][name], form)
