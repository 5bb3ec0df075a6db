"""Data looked at before a run begins: what cannot be used, and what is kept for evaluation."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from tqdm import tqdm

from kimia_infer.data.conversations import DataError

SHOWN_FAULTS = 20

Item = TypeVar("Item")


def usable(
    items: Sequence[Item], check: Callable[[Item], object], data: str, unit: str, skip: bool
) -> tuple[list[Item], list[str]]:
    """The items that ``check`` accepts and what is wrong with the others, with progress.

    Args:
        items: lines or sounds, ``unit`` says which, of the file or directory ``data``.
        check: raises DataError, naming the place, for an item that cannot be used.
        skip: whether those are left out, with a line on stderr each.

    Raises:
        DataError: some are not usable and they are not to be skipped, or none is usable.
    """
    good, faults = [], []
    for item in tqdm(items, desc=f"Checking {data}", unit=f" {unit}s", disable=None):
        try:
            check(item)
            good.append(item)
        except DataError as error:
            faults.append(str(error))
    if faults and (not skip or not good):
        shown = "\n  ".join(faults[:SHOWN_FAULTS])
        more = f"\n  and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
        advice = "" if skip else "\nmend or remove them, or set bad_lines=skip"
        raise DataError(
            f"{len(faults)} of {len(items)} {unit}s cannot be used:\n  {shown}{more}{advice}"
        )
    for fault in faults:
        print(f"skipped: {fault}", file=sys.stderr)
    return good, faults


def hold_out(
    items: Sequence[Item], ratio: float, data: str, unit: str
) -> tuple[Sequence[Item], Sequence[Item]]:
    """What is trained on, and the first ``ratio`` of ``items``, at least one, for evaluation.

    Nothing is held out where the ratio is 0. Raises DataError if nothing is left to train on.
    """
    count = max(1, int(len(items) * ratio)) if ratio else 0
    if count == len(items):
        raise DataError(
            f"{data}: one {unit} is not enough for training and evaluation; add {unit}s, name "
            "eval_data, or set eval_ratio=0"
        )
    return items[count:], items[:count]
