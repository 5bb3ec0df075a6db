"""The report of a run: every answer with its score, and the tables made from them."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from kimia_infer.data.manifests import ACCURACY, CER, MATCH, NONE, WER
from kimia_infer.evaluation.items import Item
from kimia_infer.evaluation.results import Result
from kimia_infer.evaluation.score import Score, score, summarize
from kimia_infer.utils.files import write_json_lines, write_text

ANSWERS_NAME, JSON_NAME, MARKDOWN_NAME = "answers.jsonl", "report.json", "report.md"
COLUMNS = {WER: "WER ↓", CER: "CER ↓", ACCURACY: "Accuracy ↑", MATCH: "Match ↑", NONE: "none"}
RECORDED = ("settings", "model", "environment")
SHOWN_PROBLEMS = 10
PERCENTILES = {"p50": 50, "p90": 90, "p99": 99, "max": 100}


def write_report(
    output: Path,
    items: Sequence[Item],
    results: Sequence[Result],
    faults: Sequence[str],
    record: dict[str, Any],
) -> Path:
    """Write answers, ``report.json`` and ``report.md`` into ``output``; the path of the last.

    ``results`` are those of ``items``, in the same order; ``record`` is the configuration, model
    and machine they belong to. Errors and lines left out are counted, never scored.
    """
    scores = [
        None if result.answer is None else score(item, result.answer)
        for item, result in zip(items, results, strict=True)
    ]
    entries = list(zip(items, results, scores, strict=True))
    write_json_lines(output / ANSWERS_NAME, (_answer_row(*entry) for entry in entries))
    report = {
        "results": _summaries(entries),
        "speed": _speed(results),
        "left_out": list(faults),
        "errors": [
            _name(item) | {"error": result.error}
            for item, result, _ in entries
            if result.error is not None
        ],
        **record,
    }
    write_text(output / JSON_NAME, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    write_text(output / MARKDOWN_NAME, markdown(report))
    return output / MARKDOWN_NAME


def _name(item: Item) -> dict[str, Any]:
    return {"dataset": item.dataset, "subset": item.subset, "id": item.id}


def _answer_row(item: Item, result: Result, outcome: Score) -> dict[str, Any]:
    row = _name(item) | {
        "metric": item.metric,
        "recordings": list(item.recordings.values()),
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


def _summaries(entries: Sequence[tuple[Item, Result, Score]]) -> list[dict[str, Any]]:
    """Figures by data set, subset and metric, in the order in which these first occur."""
    groups: dict[tuple[str, str, str], list[tuple[Result, Score]]] = defaultdict(list)
    for item, result, outcome in entries:
        groups[item.dataset, item.subset, item.metric].append((result, outcome))
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
    """Throughput and latency of the answers; None without any.

    The real-time factor is that of single items, from turn to answer; these times overlap if items
    are answered at the same time, whereas rates per second are by wall clock.
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
        "latency_seconds": {
            name: float(np.percentile(latencies, percent, method="inverted_cdf"))
            for name, percent in PERCENTILES.items()
        },
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown: scores with subsets side by side, speed, problems."""
    lines = ["# Evaluation", "", "| Dataset | Metric | Score (%) | Items | Errors |"]
    lines.append("|---|---|---|---|---|")
    rows: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for summary in report["results"]:
        rows[summary["dataset"], summary["metric"]].append(summary)
    for (dataset, metric), subsets in rows.items():
        names = _side_by_side(_cell(subset["subset"]) for subset in subsets)
        cells = [
            f"**{_cell(dataset)}** {names}".strip(),
            COLUMNS[metric],
            _side_by_side("–" if s["score"] is None else f"{s['score']:.2f}" for s in subsets),
            _side_by_side(str(subset["items"]) for subset in subsets),
            _side_by_side(str(subset["errors"]) for subset in subsets),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *_speed_lines(report["speed"]), *_problem_lines(report)]
    lines += ["## Settings", ""]
    for section in RECORDED:
        for name, value in report.get(section, {}).items():
            lines.append(f"- {section}, {name}: `{json.dumps(value, ensure_ascii=False)}`")
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
        f"- throughput by wall clock: {speed['items_per_second']:.3f} items and "
        f"{speed['audio_seconds_per_second']:.2f} s of audio per second; answered {together}",
        f"- real-time factor of an item: {'–' if factor is None else f'{factor:.4f}'} "
        f"({speed['processing_seconds']:.1f} s from turn to answer, all items, for "
        f"{speed['audio_seconds']:.1f} s of audio)",
        f"- latency of an item: {times}",
        "",
    ]


def _problem_lines(report: dict[str, Any]) -> list[str]:
    """Items that the scores leave out, and answers that are scored as wrong for formal reasons."""
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
