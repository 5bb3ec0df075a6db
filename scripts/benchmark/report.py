"""Tables of what was measured, and a report of them in Markdown. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Cell = str | int | float | None


@dataclass
class Table:
    """Rows of one measurement: cells by column, whose name gives the unit.

    ``problems`` are results that are wrong, such as a reference that is not met.
    """

    title: str
    rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """The table, aligned so that it can be read as plain text."""
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        body = []
        for name in columns:
            values = [row.get(name) for row in self.rows]
            cells = [name, *map(shown, values)]
            width, number = max(map(len, cells)), any(isinstance(v, int | float) for v in values)
            cells = [cell.rjust(width) if number else cell.ljust(width) for cell in cells]
            body.append([cells[0], "-" * (width - number) + ":" * number, *cells[1:]])
        lines = [f"| {' | '.join(cells)} |" for cells in zip(*body, strict=True)]
        text = [f"### {self.title}", "", *lines]
        for line in (*self.notes, *(f"**Wrong:** {problem}" for problem in self.problems)):
            text += ["", line]
        return "\n".join(text) + "\n"


def shown(value: Cell) -> str:
    """A cell as text: numbers with four significant digits, "-" for what does not exist."""
    if value is None:
        return "-"
    if isinstance(value, float):
        if value and abs(value) < 1e-3:
            return f"{value:.1e}"
        digits = max(0, 3 - len(str(int(abs(value)))) + (abs(value) < 1))
        return f"{value:.{digits}f}"
    return str(value)


def markdown(results: dict[str, Any]) -> str:
    """The report of ``results``: about the machine, how each measurement ended, then its tables."""
    about = results.get("about", {})
    lines = ["# Benchmark", "", *(f"- {name}: {value}" for name, value in about.items()), ""]
    measured = results["measurements"]
    rows = [
        {"measurement": name, "result": state_of(entry), "seconds": entry.get("seconds")}
        for name, entry in measured.items()
    ]
    lines.append(Table("Measurements", rows).markdown())
    for name, entry in measured.items():
        lines.append(f"## {name}\n")
        lines += [Table(**table).markdown() for table in entry.get("tables", [])]
        if "error" in entry:
            lines.append(f"{entry['error']}\n\n```\n{entry.get('traceback', '').rstrip()}\n```\n")
    return "\n".join(lines)


def state_of(entry: dict[str, Any]) -> str:
    if "error" in entry:
        return "failed"
    problems = sum(len(table["problems"]) for table in entry["tables"])
    return f"{problems} wrong" if problems else "done"
