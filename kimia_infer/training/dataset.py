"""Conversations, checked before training and built into batches while it runs."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from kimia_infer.training.batch import Batch, join
from kimia_infer.training.conversations import ConversationFile, DataError
from kimia_infer.training.plan import MicroBatch, StepPlan
from kimia_infer.training.samples import SampleBuilder

SHOWN_FAULTS = 20


@dataclass(frozen=True)
class Samples(Dataset):
    """The usable lines of a file; asked for a :class:`MicroBatch`, it gives a batch."""

    file: ConversationFile
    builder: SampleBuilder
    lines: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, part: MicroBatch) -> Batch | DataError:
        """Errors are returned, since a reading process would hide them in a long report."""
        try:
            samples = []
            for index in part.indices:
                line = self.lines[index]
                try:
                    samples.append(self.builder.build(self.file[line]))
                except DataError as error:
                    raise DataError(_located(self.file, line, error)) from error
        except DataError as error:
            return DataError(str(error))
        names = [self.file.where(self.lines[index]) for index in part.indices]
        return join(samples, self.builder.special.pad, part.weights, names)


def check_lines(
    file: ConversationFile, builder: SampleBuilder, lines: Sequence[int], skip: bool
) -> tuple[Samples, list[str]]:
    """The usable ones among ``lines`` and what is wrong with the others, with progress.

    Raises:
        DataError: some are not usable and they are not to be skipped, or none is usable.
    """
    good, faults = [], []
    progress = tqdm(lines, desc=f"Checking {file.path.name}", unit=" lines", disable=None)
    for line in progress:
        try:
            builder.check(file[line])
            good.append(line)
        except DataError as error:
            faults.append(_located(file, line, error))
    if faults and (not skip or not good):
        shown = "\n  ".join(faults[:SHOWN_FAULTS])
        more = f"\n  and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
        advice = "" if skip else "\nmend or remove them, or set bad_lines=skip"
        raise DataError(
            f"{len(faults)} of {len(lines)} lines cannot be used:\n  {shown}{more}{advice}"
        )
    for fault in faults:
        print(f"skipped: {fault}", file=sys.stderr)
    return Samples(file, builder, tuple(good)), faults


def batches(
    samples: Samples, plan: StepPlan, first: int, end: int, rank: int, workers: int, pin: bool
) -> Iterator[Batch]:
    """The batches of the steps from ``first`` on, before ``end``, in order.

    ``workers`` processes read ahead; ``pin`` puts them into page-locked memory. Raises
    DataError for what the checks could not see, such as a sound that has changed.
    """
    loader = DataLoader(
        samples,
        batch_size=None,
        sampler=_Passes(plan, first, end, rank),
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=_ignore_interrupts,
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch


def _ignore_interrupts(worker: int) -> None:
    """The training process decides when a run ends; it still needs its batches until then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Passes(Sampler):
    def __init__(self, plan: StepPlan, first: int, end: int, rank: int):
        self._arguments = (plan, first, end, rank)

    def __iter__(self) -> Iterator[MicroBatch]:
        plan, *rest = self._arguments
        return plan.flat(*rest)


def _located(file: ConversationFile, line: int, error: DataError) -> str:
    """The error, beginning with file and line, which those of reading a line have already."""
    where = file.where(line)
    text = str(error)
    return text if text.startswith(where) else f"{where}: {text}"
