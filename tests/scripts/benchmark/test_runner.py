"""Measurements in processes of their own: failures, time limits, and results that are kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from scripts.benchmark.report import Table, shown
from scripts.benchmark.runner import Results, Setup, run

WORKER = """
import json, sys, time
asked = json.loads(sys.argv[1])
print(json.dumps({"device": "cuda:0, a card", "group": asked["names"]}), flush=True)
row = {"steps/s": 2.0}
table = {"title": "Speed", "rows": [row], "notes": ["a note"], "problems": []}
for name in asked["names"]:
    if name == "first":
        print("an illegal access", file=sys.stderr, flush=True)
        sys.exit(3)
    if name == "speech":
        time.sleep(60)
    if name == "encoders":
        table = table | {"problems": ["an encoder differs"]}
    if name == "concurrency":
        for done in (1, 2):
            print(json.dumps({"progress": [done, 2]}), flush=True)
    print(json.dumps({"tables": [table]}), flush=True)
"""


def measured(
    folder: Path | None, *names: str, minutes: float | None = None
) -> tuple[bool, Results, dict[str, dict[str, Any]]]:
    results, seen = Results(folder), {}
    setup = Setup(size="tiny", folder=None if folder is None else str(folder))
    command = (sys.executable, "-c", WORKER)
    good = run(setup, names, results, minutes, seen.__setitem__, command)
    return good, results, seen


def test_what_is_done_is_written(tmp_path: Path) -> None:
    good, _, seen = measured(tmp_path, "references", "decode", "requests")
    assert good and list(seen) == ["references", "decode", "requests"]
    stored = json.loads((tmp_path / "results.json").read_text())
    assert list(stored["measurements"]) == list(seen)
    assert stored["about"]["group"] == ["decode", "requests"]  # references have another process
    report = (tmp_path / "report.md").read_text()
    assert "- device: cuda:0, a card" in report and "| steps/s |" in report and "a note" in report


def test_others_are_measured_after_a_process_has_died(tmp_path: Path) -> None:
    good, results, seen = measured(tmp_path, "decode", "first", "requests", "profile")
    assert not good and list(seen) == ["decode", "first", "requests", "profile"]
    assert seen["first"]["error"] == "the process ended with status 3"
    assert seen["first"]["traceback"] == "an illegal access"
    assert "an illegal access" in (tmp_path / "report.md").read_text()
    assert not results.done("first") and results.done("requests")


def test_one_that_takes_too_long_is_stopped_and_nothing_begins_later() -> None:
    good, _, seen = measured(None, "decode", "speech", "profile", minutes=0.05)
    assert not good and "error" not in seen["decode"]
    assert seen["speech"]["error"].startswith("stopped after")
    assert seen["profile"]["error"] == "not started: no time was left"


def test_results_are_continued(tmp_path: Path) -> None:
    measured(tmp_path, "profile", "first")
    good, results, _ = measured(tmp_path, "decode")
    assert good and results.done("profile") and not results.done("first")
    assert list(results.values["measurements"]) == ["decode", "first", "profile"]


def test_a_wrong_result_is_not_good() -> None:
    good, _, seen = measured(None, "encoders")
    assert not good and seen["encoders"]["tables"][0]["problems"] == ["an encoder differs"]


def test_progress_is_passed_on_and_is_no_result() -> None:
    told, command = [], (sys.executable, "-c", WORKER)
    good = run(
        Setup(size="tiny"), ["concurrency", "decode"], Results(None), None, lambda *_: None,
        command, lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert good and told == [(1, 2), (2, 2)]


def test_a_table_in_markdown() -> None:
    rows = [{"loop": "ours", "steps/s": 1234.5, "GB": None}, {"loop": "plain", "steps/s": 1.0}]
    table = Table("Speed", rows, ["a note"], ["too slow"]).markdown().splitlines()
    assert table[2:6] == [
        "| loop  | steps/s | GB |",
        "| ----- | ------: | -- |",
        "| ours  |    1234 | -  |",
        "| plain |    1.00 | -  |",
    ]
    assert table[7:] == ["a note", "", "**Wrong:** too slow"]


def test_numbers_have_their_digits() -> None:
    values = [None, 7, 0.0, 0.5, 3.14159, 31.4159, 314.159, 2e-6, "x"]
    assert [shown(value) for value in values] == [
        "-", "7", "0.000", "0.500", "3.14", "31.4", "314", "2.0e-06", "x",
    ]  # fmt: skip
