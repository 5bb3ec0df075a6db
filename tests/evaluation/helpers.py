"""What runs write, read back and compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from kimia_infer.evaluation.results import EvaluationConfig
from kimia_infer.evaluation.run import Summary
from tests.paths import MINI

SAMPLING = {"max_new_tokens": 6, "seed": 0}
CONFIG = EvaluationConfig(weights=str(MINI), device="cpu", sampling=SAMPLING)

Write = Callable[..., Path]
Run = Callable[..., Summary]


def report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def answers(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def results(folder: Path) -> int:
    """The number of stored results."""
    path = folder / "results.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def assert_same(first: Path, second: Path) -> None:
    """Two runs agree in everything but time."""
    assert answers(first) == answers(second)
    one, other = report(first), report(second)
    for name in ("results", "errors", "left_out", "settings", "model"):
        assert one[name] == other[name]
