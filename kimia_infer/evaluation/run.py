"""Run manifests through the serving path and report how good and how fast the answers are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.parameters import Parameters, parse_parameters
from kimia_infer.evaluation.answering import answer_items
from kimia_infer.evaluation.items import EvaluationError, Item
from kimia_infer.evaluation.journal import Journal
from kimia_infer.evaluation.manifest import Manifest
from kimia_infer.evaluation.record import Record, Settings
from kimia_infer.evaluation.report import write_report


@dataclass(frozen=True)
class Outcome:
    """How a run ended: items that were answered, that failed, and lines that were left out."""

    answered: int
    errors: int
    faults: int
    report: Path


def evaluate(
    manifests: Sequence[Manifest],
    settings: Settings,
    output: Path,
    load_model: Callable[[Settings], KimiAudio],
    retry_errors: bool = False,
    batch_size: int = 1,
) -> Outcome:
    """Answer all items of ``manifests`` and write the report into ``output``.

    Results are appended to ``results.jsonl`` as they come; called again, the run goes on after
    the last one. An item that cannot be answered is recorded with the reason, and asked again
    only if ``retry_errors``. The model is loaded only if something is left to answer.
    ``batch_size`` items are answered together; a run may go on with another number, which its
    results tell.

    Raises:
        EvaluationError: ``output`` belongs to a run with other settings or items, or there is no
            memory for so many items at a time.
        RequestError: a setting of the sampling is not allowed.
    """
    options = parse_parameters(**settings.sampling)
    items = [item for manifest in manifests for item in manifest.items[: settings.limit]]
    _check_keys(items)
    output.mkdir(parents=True, exist_ok=True)
    with Journal(output) as journal:
        record = Record(output, settings, items, continues=bool(journal.results))
        if retry_errors:
            journal.forget_errors()
        left = [item for item in items if item.key not in journal.results]
        if left:
            model = load_model(settings)
            model.check(options)
            record.note_model(model)
            _answer_left(left, journal, model, options, batch_size)
        results = [journal.results[item.key] for item in items]
        faults = [fault for manifest in manifests for fault in manifest.faults]
        report = write_report(output, items, results, faults, record.values)
    errors = sum(result.error is not None for result in results)
    return Outcome(len(results) - errors, errors, len(faults), report)


def _answer_left(
    left: Sequence[Item], journal: Journal, model: KimiAudio, options: Parameters, batch_size: int
) -> None:
    """Add the results of the items that are left to the journal, with a progress bar."""
    done = len(journal.results)
    errors = sum(result.error is not None for result in journal.results.values())
    with (
        tqdm(total=done + len(left), initial=done, desc="Evaluating", unit=" items") as bar,
        contextlib.closing(answer_items(left, model, options, batch_size)) as results,
    ):
        for result in results:
            journal.add(result)
            errors += result.error is not None
            bar.set_postfix(errors=errors, refresh=False)
            bar.update()


def _check_keys(items: Sequence[Item]) -> None:
    """Raise EvaluationError if two manifests have an item of the same name."""
    seen = set()
    for item in items:
        if item.key in seen:
            dataset, subset, name = item.key
            raise EvaluationError(
                f"{' '.join(filter(None, (dataset, subset)))}: item {name!r} is in two manifests; "
                "give one of them another 'dataset', 'subset' or file name"
            )
        seen.add(item.key)
