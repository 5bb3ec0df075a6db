"""The outcome of a run: every answer with its score, and the tables made of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kimia_infer.evaluation.items import ACCURACY, CER, MATCH, NONE, WER, Item
from kimia_infer.evaluation.journal import Result
from kimia_infer.evaluation.record import write_whole
from kimia_infer.evaluation.scoring import Score, percentile, score, summarize

ANSWERS_NAME, JSON_NAME, MARKDOWN_NAME = "answers.jsonl", "report.json", "report.md"
COLUMNS = {
    WER: "WER ↓",
    CER: "CER ↓",
    ACCURACY: "Accuracy ↑",
    MATCH: "Match ↑",
    NONE: "none (for a judge)",
}
RECORDED = ("settings", "model", "environment")
SHOWN_PROBLEMS = 10
PERCENTILES = (50, 90, 99)


def write_report(
    output: Path,
    items: Sequence[Item],
    results: Sequence[Result],
    faults: Sequence[str],
    record: dict[str, Any],
) -> Path:
    """Write answers, ``report.json`` and ``report.md`` into ``output``; the path of the last.

    ``results`` belong to ``items`` one by one; ``record`` is what they are results of. Errors and
    lines left out are counted, never scored.
    """
    scores = [
        None if result.answer is None else score(item, result.answer)
        for item, result in zip(items, results, strict=True)
    ]
    rows = (_answer_row(*entry) for entry in zip(items, results, scores, strict=True))
    write_whole(output / ANSWERS_NAME, "".join(_line(row) for row in rows))
    report = {
        "results": _summaries(items, results, scores),
        "speed": _speed(results),
        "left_out": list(faults),
        "errors": [
            {"dataset": item.dataset, "subset": item.subset, "id": item.id, "error": result.error}
            for item, result in zip(items, results, strict=True)
            if result.error is not None
        ],
        **record,
    }
    write_whole(output / JSON_NAME, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    write_whole(output / MARKDOWN_NAME, markdown(report))
    return output / MARKDOWN_NAME


def _answer_row(item: Item, result: Result, outcome: Score) -> dict[str, Any]:
    row: dict[str, Any] = {
        "dataset": item.dataset,
        "subset": item.subset,
        "id": item.id,
        "metric": item.metric,
        "sounds": list(item.sounds.values()),
        "question": item.question,
        "reference": item.reference,
    }
    if item.choices:
        row["choices"] = list(item.choices)
    if result.error is not None:
        return row | {"error": result.error}
    row |= {"answer": result.answer, "stop_reason": result.stop_reason}
    if outcome is not None:
        row["score"] = asdict(outcome)
    return row | ({"notes": list(result.notes)} if result.notes else {})


def _summaries(
    items: Sequence[Item], results: Sequence[Result], scores: Sequence[Score]
) -> list[dict[str, Any]]:
    """Figures by data set, subset and metric, in the order in which these first occur."""
    groups: dict[tuple[str, str, str], list[tuple[Result, Score]]] = {}
    for item, result, outcome in zip(items, results, scores, strict=True):
        group = groups.setdefault((item.dataset, item.subset, item.metric), [])
        group.append((result, outcome))
    summaries = []
    for (dataset, subset, metric), members in groups.items():
        answered = [outcome for result, outcome in members if result.answer is not None]
        summaries.append(
            {
                "dataset": dataset,
                "subset": subset,
                "metric": metric,
                **summarize(metric, answered),
                "items": len(members),
                "errors": len(members) - len(answered),
                "unfinished": sum(r.stop_reason not in ("end", None) for r, _ in members),
            }
        )
    return summaries


def _speed(results: Sequence[Result]) -> dict[str, Any] | None:
    """How fast the answers came; None without any.

    The factor is that of an item, from its turn to its answer; where items are answered together
    these times overlap, and what is done a second is by the clock on the wall.
    """
    answered = [result for result in results if result.answer is not None]
    if not answered:
        return None
    latencies = [result.seconds for result in answered]
    audio, wall = sum(r.audio_seconds for r in answered), sum(r.wall_seconds for r in results)
    return {
        "audio_seconds": audio,
        "processing_seconds": sum(latencies),
        "real_time_factor": sum(latencies) / audio if audio else None,
        "wall_seconds": wall,
        "items_per_second": len(results) / wall,
        "audio_seconds_per_second": audio / wall,
        "items_by_batch_size": dict(sorted(Counter(r.batch_size for r in results).items())),
        "latency_seconds": {f"p{p}": percentile(latencies, p) for p in PERCENTILES}
        | {"max": max(latencies)},
    }


def markdown(report: dict[str, Any]) -> str:
    """The report to read: scores with the subsets of a data set side by side, speed, problems."""
    lines = ["# Evaluation", "", "| Dataset | Metric | Score (%) | Items | Errors |"]
    lines.append("|---|---|---|---|---|")
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for summary in report["results"]:
        rows.setdefault((summary["dataset"], summary["metric"]), []).append(summary)
    for (dataset, metric), parts in rows.items():
        names = _side_by_side(_cell(part["subset"]) for part in parts)
        cells = [
            f"**{_cell(dataset)}** {names}".strip(),
            COLUMNS[metric],
            _side_by_side("–" if p["score"] is None else f"{p['score']:.2f}" for p in parts),
            _side_by_side(str(part["items"]) for part in parts),
            _side_by_side(str(part["errors"]) for part in parts),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *_speed_lines(report["speed"]), *_problem_lines(report)]
    lines += ["## Settings", ""]
    for part in RECORDED:
        for name, value in report.get(part, {}).items():
            lines.append(f"- {part}, {name}: `{json.dumps(value, ensure_ascii=False)}`")
    return "\n".join(lines) + "\n"


def _speed_lines(speed: dict[str, Any] | None) -> list[str]:
    if speed is None:
        return []
    factor, latency = speed["real_time_factor"], speed["latency_seconds"]
    times = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in latency.items())
    sizes = speed["items_by_batch_size"]
    together = ", ".join(
        ("one at a time" if size == 1 else f"up to {size} at a time")
        + (f" ({items} items)" if len(sizes) > 1 else "")
        for size, items in sizes.items()
    )
    return [
        "## Speed",
        "",
        f"- throughput by the clock: {speed['items_per_second']:.3f} items and "
        f"{speed['audio_seconds_per_second']:.2f} s of sound per second; answered {together}",
        f"- real-time factor of an item: {'–' if factor is None else f'{factor:.4f}'} "
        f"({speed['processing_seconds']:.1f} s from turn to answer, all items, for "
        f"{speed['audio_seconds']:.1f} s of sound)",
        f"- latency of an item: {times}",
        "",
    ]


def _problem_lines(report: dict[str, Any]) -> list[str]:
    """What is not in the scores, and what makes them worse than the model may be."""
    problems = [f"left out: {fault}" for fault in report["left_out"]]
    problems += [
        f"error: {' '.join(filter(None, (e['dataset'], e['subset'], e['id'])))}: {e['error']}"
        for e in report["errors"]
    ]
    lines = [f"- {problem}" for problem in problems[:SHOWN_PROBLEMS]]
    if len(problems) > SHOWN_PROBLEMS:
        lines.append(f"- and {len(problems) - SHOWN_PROBLEMS} more in {JSON_NAME}")
    for summary in report["results"]:
        name = " ".join(filter(None, (summary["dataset"], summary["subset"])))
        name += f", {COLUMNS[summary['metric']]}"
        if summary["unfinished"]:
            lines.append(f"- {name}: {summary['unfinished']} answers stopped before their end")
        if summary.get("unrecognized"):
            lines.append(f"- {name}: {summary['unrecognized']} answers name no choice (wrong)")
    return ["## Problems", "", *lines, ""] if lines else []


def _side_by_side(cells: Iterable[str]) -> str:
    return " \\| ".join(cells)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
