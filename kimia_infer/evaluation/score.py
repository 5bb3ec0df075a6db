"""Scores of answers, one by one and summarized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kimia_infer.data.manifests import ACCURACY, CER, MATCH, NONE, WER
from kimia_infer.evaluation.items import Item
from kimia_infer.evaluation.texts import chosen, contains, index_of, normalize, normalize_characters


@dataclass(frozen=True)
class Errors:
    """Differences between an answer and its reference, in words or characters.

    ``reference`` and ``answer`` are the normalized texts that were compared.
    """

    substitutions: int
    deletions: int
    insertions: int
    reference_length: int
    reference: str
    answer: str


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is right; ``choice`` is the one it names, None if it names none."""

    correct: bool
    choice: str | None = None


Score = Errors | Verdict | None


def score(item: Item, answer: str) -> Score:
    """Score an answer by the metric of its item; None for the metric "none"."""
    if item.metric in (WER, CER):
        return _errors(item, answer)
    if item.metric == ACCURACY:
        asked = (item.choices, item.question, item.language)
        index = chosen(answer, *asked)
        right = index == index_of(item.reference, *asked)
        return Verdict(right, None if index is None else item.choices[index])
    if item.metric == MATCH:
        text = normalize(answer, item.language)
        return Verdict(contains(text, normalize(item.reference, item.language)))
    return None


def _errors(item: Item, answer: str) -> Errors:
    import jiwer

    if item.metric == WER:
        form, process = normalize, jiwer.process_words
    else:
        form, process = normalize_characters, jiwer.process_characters
    reference, hypothesis = form(item.reference, item.language), form(answer, item.language)
    counts = process(reference, hypothesis)
    return Errors(
        counts.substitutions,
        counts.deletions,
        counts.insertions,
        counts.hits + counts.substitutions + counts.deletions,
        reference,
        hypothesis,
    )


def summarize(metric: str, scores: Sequence[Any]) -> dict[str, Any]:
    """The figures of many answers scored by one metric; ``score`` is in percent.

    Error rates are those of all references together, not means of rates. ``score`` is None if
    there is nothing to divide by.
    """
    if metric == NONE:
        return {"score": None}
    if metric in (WER, CER):
        errors = [score for score in scores if isinstance(score, Errors)]
        names = ("substitutions", "deletions", "insertions", "reference_length")
        totals = {name: sum(getattr(counts, name) for counts in errors) for name in names}
        wrong = totals["substitutions"] + totals["deletions"] + totals["insertions"]
        return {"score": _percent(wrong, totals["reference_length"]), **totals}
    verdicts = [score for score in scores if isinstance(score, Verdict)]
    correct = sum(verdict.correct for verdict in verdicts)
    figures: dict[str, Any] = {"score": _percent(correct, len(verdicts)), "correct": correct}
    if metric == ACCURACY:
        figures["unrecognized"] = sum(verdict.choice is None for verdict in verdicts)
    return figures


def _percent(count: int, total: int) -> float | None:
    return 100 * count / total if total else None
