"""Checks of data before a run begins, and the split into training and validation data."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from kimia_infer.data.conversations import DataError
from kimia_infer.utils.progress import progress

SHOWN_FAULTS = 20

log = logging.getLogger(__name__)
Item = TypeVar("Item")


def usable(
    items: Sequence[Item], check: Callable[[Item], object], data: str, unit: str, skip: bool
) -> tuple[list[Item], list[str]]:
    """Split ``items`` into those that ``check`` accepts and the error messages of the others.

    Args:
        items: of the file or directory ``data``; ``unit`` is what they are, in the singular.
        check: raises DataError, naming the place, for an item that cannot be used.
        skip: whether to skip such items, with a warning for each.

    Raises:
        DataError: an item cannot be used and ``skip`` is false, or no item can be used.
    """
    good, faults = [], []
    for item in progress(f"Checking {data}", unit=f"{unit}s", iterable=items):
        try:
            check(item)
            good.append(item)
        except DataError as error:
            faults.append(str(error))
    if faults and (not skip or not good):
        shown = "\n  ".join(faults[:SHOWN_FAULTS])
        more = f"\n  and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
        advice = "" if skip else "\nfix or remove them, or set bad_lines=skip"
        raise DataError(
            f"{len(faults)} of {len(items)} {unit}s cannot be used:\n  {shown}{more}{advice}"
        )
    for fault in faults:
        log.warning("skipped: %s", fault)
    return good, faults


def hold_out(
    items: Sequence[Item], ratio: float, data: str, unit: str
) -> tuple[Sequence[Item], Sequence[Item]]:
    """Split ``items`` into training items and the first ``ratio``, at least one, for validation.

    Nothing is held out if the ratio is 0. Raises DataError if nothing is left to train on.
    """
    count = max(1, int(len(items) * ratio)) if ratio else 0
    if count == len(items):
        raise DataError(
            f"{data}: one {unit} is not enough for training and validation; add {unit}s, name "
            "eval_data, or set eval_ratio=0"
        )
    return items[count:], items[:count]
