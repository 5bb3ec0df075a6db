"""Evaluate the model on manifests and report how good and how fast its answers are."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.parameters import Parameters, parse_parameters
from kimia_infer.evaluation.answering import Finished, answer_items
from kimia_infer.evaluation.items import Item, Manifest
from kimia_infer.evaluation.report import write_report
from kimia_infer.evaluation.results import (
    EvaluationConfig,
    EvaluationError,
    Record,
    Result,
    Results,
    open_results,
)
from kimia_infer.utils.errors import RequestError
from kimia_infer.utils.progress import progress


@dataclass(frozen=True)
class Summary:
    """Numbers of items that were answered and that failed, and of lines left out; the report."""

    answered: int
    errors: int
    faults: int
    report: Path


def evaluate(
    manifests: Sequence[Manifest],
    config: EvaluationConfig,
    output: Path,
    load_model: Callable[[EvaluationConfig], KimiAudio],
    retry_errors: bool = False,
    batch_size: int = 1,
) -> Summary:
    """Answer all items of ``manifests`` and write the report into the directory ``output``.

    Results are stored as they come; the same call continues an interrupted run. An item that
    cannot be answered is recorded with the reason, and is tried again only if ``retry_errors``.
    The model is loaded only if items are left. ``batch_size`` items are answered at a time; a run
    may continue with another size, which its results record.

    Raises:
        EvaluationError: ``output`` belongs to a run with another configuration or other items.
        ConfigurationError: there is no memory for so many items at a time.
        RequestError: a sampling parameter is not allowed.
    """
    options = parse_parameters(**config.sampling)
    items = [item for manifest in manifests for item in manifest.items[: config.limit]]
    _check_keys(items)
    with open_results(output) as results:
        record = Record(output, config, items, continues=bool(results.by_key))
        if retry_errors:
            results.by_key = {k: r for k, r in results.by_key.items() if r.error is None}
        remaining = [item for item in items if item.key not in results.by_key]
        if remaining:
            model = load_model(config)
            model.check(options)
            record.add_model(model)
            _answer(remaining, results, model, options, batch_size)
        ordered = [results.by_key[item.key] for item in items]
        faults = [fault for manifest in manifests for fault in manifest.faults]
        report = write_report(output, items, ordered, faults, record.values)
    errors = sum(result.error is not None for result in ordered)
    return Summary(len(ordered) - errors, errors, len(faults), report)


def _answer(
    items: Sequence[Item], results: Results, model: KimiAudio, options: Parameters, batch_size: int
) -> None:
    done, last = len(results.by_key), time.perf_counter()
    errors = sum(result.error is not None for result in results.by_key.values())
    with (
        progress("Evaluating", done + len(items), "items", initial=done) as bar,
        contextlib.closing(answer_items(items, model, options, batch_size)) as answered,
    ):
        for finished in answered:
            now = time.perf_counter()
            results.add(_result(finished, now - last, batch_size))
            last = now
            errors += isinstance(finished.outcome, RequestError)
            bar.set_postfix(errors=errors, refresh=False)
            bar.update()


def _result(finished: Finished, wall_seconds: float, batch_size: int) -> Result:
    outcome = finished.outcome
    key = finished.item.key
    common = {"key": key, "wall_seconds": wall_seconds, "batch_size": batch_size}
    if isinstance(outcome, RequestError):
        return Result(**common, error=str(outcome))
    return Result(
        **common,
        answer=outcome.text,
        seconds=finished.seconds,
        audio_seconds=outcome.metrics["input_audio_seconds"],
        stop_reason=outcome.metrics["stop_reason"],
        notes=tuple(outcome.notes),
    )


def _check_keys(items: Sequence[Item]) -> None:
    """Raise EvaluationError if two manifests have an item of the same name."""
    for (dataset, subset, name), count in Counter(item.key for item in items).items():
        if count > 1:
            raise EvaluationError(
                f"{dataset} {subset}".strip() + f": item {name!r} is in two manifests; give one of "
                "them another 'dataset', 'subset' or file name"
            )
