"""Conversations, checked before training and built into batches while it runs."""

from __future__ import annotations

import logging
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from kimia_infer.data.conversations import Conversation, DataError
from kimia_infer.training.config import TrainingConfig
from kimia_infer.training.plan import MicroBatch, StepPlan
from kimia_infer.training.samples import Sample, SampleBuilder
from kimia_infer.utils.progress import progress

SHOWN_FAULTS = 20

log = logging.getLogger(__name__)
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Batch(Sample):
    """Samples padded at their end: ids, labels and masks are [batch, length].

    Segments and features of all samples are joined in order. ``weights`` [batch] are the weights
    of the losses; ``names`` says for reports where the samples come from.
    """

    weights: Tensor
    names: list[str]

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """For the data loader: a copy in page-locked memory."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed = {n: change(value) for n, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **changed, mel=[change(mel) for mel in self.mel])


def join(
    samples: Sequence[Sample], pad: int, weights: Sequence[float], names: Sequence[str] = ()
) -> Batch:
    """Pad ``samples`` to the longest of them with ``pad`` and masks that are False.

    Padding follows a sample, and attention is causal, so no position of a sample sees it.
    """

    def column(name: str, filler: int | bool) -> Tensor:
        values = [getattr(sample, name) for sample in samples]
        return pad_sequence(values, batch_first=True, padding_value=filler)

    ids = ("audio_ids", "text_ids", "audio_labels", "text_labels")
    masks = ("is_continuous", "audio_loss_mask", "text_loss_mask")
    stored = [sample.features for sample in samples if sample.features is not None]
    return Batch(
        **{name: column(name, pad) for name in ids},
        **{name: column(name, False) for name in masks},
        weights=torch.tensor(weights, dtype=torch.float32),
        mel=[mel for sample in samples for mel in sample.mel],
        segment_codes=[count for sample in samples for count in sample.segment_codes],
        names=list(names),
        features=torch.cat(stored) if stored else None,
    )


@dataclass
class TrainingData(ABC):
    """Usable items of a data set, each of which is a ``unit`` and gives a sample."""

    items: Sequence[Any]
    unit: ClassVar[str]

    def __len__(self) -> int:
        return len(self.items)

    @abstractmethod
    def __getitem__(self, part: MicroBatch, /) -> Any:
        """A batch with ``weights``, ``names`` and ``to``. Raises DataError, naming the item."""


class Lines(Protocol):
    """Conversations of a file, by index; ``where`` begins error messages about one."""

    path: Path

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Conversation: ...

    def where(self, index: int, /) -> str: ...


@dataclass
class Samples(TrainingData):
    """Lines of a file, by their index; ``positions`` is the length of the sample of each."""

    file: Lines
    builder: SampleBuilder
    positions: Mapping[int, int]
    unit = "line"

    @property
    def lengths(self) -> list[int]:
        """Of all samples, in positions."""
        return [self.positions[line] for line in self.items]

    def recordings(self) -> Iterator[Path]:
        """The audio files that samples have Whisper features of; some more than once."""
        for line in self.items:
            yield from self.builder.recordings(self.file[line])

    def __getitem__(self, part: MicroBatch) -> Batch:
        lines = [self.items[index] for index in part.indices]
        samples = [with_line(self.builder.build, self.file, line) for line in lines]
        names = [self.file.where(line) for line in lines]
        return join(samples, self.builder.special.pad, part.weights, names)


def check_lines(file: Lines, builder: SampleBuilder, skip: bool) -> Samples:
    """The :func:`usable` lines of ``file``."""
    positions = {}

    def check(line: int) -> None:
        positions[line] = len(with_line(builder.check, file, line))

    lines = usable(range(len(file)), check, file.path.name, Samples.unit, skip)
    return Samples(lines, file, builder, positions)


def usable(
    items: Sequence[Item], check: Callable[[Item], object], data: str, unit: str, skip: bool
) -> list[Item]:
    """Those ``items`` of ``data`` for which ``check`` does not raise DataError.

    ``skip`` logs a warning for each of the others. Raises DataError for them without it, or if no
    item can be used.
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
    return good


Data = TypeVar("Data", bound=TrainingData)


def split_data(config: TrainingConfig, read: Callable[[str], Data]) -> tuple[Data, Data | None]:
    """Training and validation data, as ``read`` gives them for a file or directory.

    Validation uses ``eval_data``; or the first ``eval_ratio`` of the data, at least one item, as
    published; or nothing where the ratio is 0. Raises DataError if nothing is left to train on.
    """
    samples = read(config.data)
    if config.eval_data is not None:
        return samples, read(config.eval_data)
    count = max(1, int(len(samples) * config.eval_ratio)) if config.eval_ratio else 0
    if count == len(samples):
        raise DataError(
            f"{config.data}: one {samples.unit} is not enough for training and validation; add "
            f"{samples.unit}s, name eval_data, or set eval_ratio=0"
        )
    rest, first = samples.items[count:], samples.items[:count]
    return replace(samples, items=rest), replace(samples, items=first) if first else None


def batches(
    samples: TrainingData, plan: StepPlan, first: int, end: int, rank: int, workers: int, pin: bool
) -> Iterator[Any]:
    """The batches of the steps from ``first`` on, before ``end``, in order.

    ``workers`` processes read ahead; ``pin`` puts them into page-locked memory. Raises
    DataError for what the checks could not see, such as an audio file that has changed.
    """
    passes = (part for step in range(first, end) for part in plan.micro_batches(step, rank))
    loader = DataLoader(
        _ErrorsReturned(samples),
        batch_size=None,
        sampler=passes,
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


@dataclass(frozen=True)
class _ErrorsReturned(Dataset):
    """A reading process would hide a DataError in a long report, so it is returned."""

    samples: TrainingData

    def __getitem__(self, part: MicroBatch) -> Any:  # pyrefly: ignore[bad-override-param-name]
        try:
            return self.samples[part]
        except DataError as error:
            return DataError(str(error))


def with_line(function: Callable[[Conversation], Any], file: Lines, line: int) -> Any:
    """The result for the conversation in ``line``, which every DataError names."""
    conversation = file[line]
    try:
        return function(conversation)
    except DataError as error:
        raise DataError(f"{file.where(line)}: {error}") from error
