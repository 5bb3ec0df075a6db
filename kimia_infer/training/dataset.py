"""Conversations, checked before training and built into batches while it runs."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler

from kimia_infer.data.checking import usable
from kimia_infer.data.conversations import ConversationFile, DataError
from kimia_infer.training.plan import MicroBatch, StepPlan
from kimia_infer.training.samples import Sample, SampleBuilder


@dataclass(frozen=True)
class Batch:
    """Samples padded at their end; ids, labels and masks are [batch, length].

    ``weights`` [batch] are the weights of their losses. ``mel`` [segments, mels, frames]
    and ``segment_codes`` join the segments of all samples in order, None and empty without audio.
    ``features`` [positions, dim] likewise join stored Whisper features, and there is no mel then.
    ``names`` says for reports where the samples come from.
    """

    audio_ids: Tensor
    text_ids: Tensor
    is_continuous: Tensor
    audio_labels: Tensor
    text_labels: Tensor
    audio_loss_mask: Tensor
    text_loss_mask: Tensor
    weights: Tensor
    mel: Tensor | None
    segment_codes: list[int]
    names: list[str]
    features: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)

    def pin_memory(self) -> Batch:
        """For the data loader: a copy in page-locked memory."""
        pinned = {
            field.name: value.pin_memory()
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **pinned)


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
    mels = [sample.mel for sample in samples if sample.mel is not None]
    stored = [sample.features for sample in samples if sample.features is not None]
    return Batch(
        **{name: column(name, pad) for name in ids},
        **{name: column(name, False) for name in masks},
        weights=torch.tensor(weights, dtype=torch.float32),
        mel=torch.cat(mels) if mels else None,
        segment_codes=[count for sample in samples for count in sample.segment_codes],
        names=list(names),
        features=torch.cat(stored) if stored else None,
    )


@dataclass(frozen=True)
class Samples(Dataset):
    """The usable lines of a file; indexed by a :class:`MicroBatch`, which gives a batch.

    ``positions`` is the length of the sample of each line.
    """

    file: ConversationFile
    builder: SampleBuilder
    lines: tuple[int, ...]
    positions: Mapping[int, int]

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def lengths(self) -> list[int]:
        """Of all samples, in positions."""
        return [self.positions[line] for line in self.lines]

    def recordings(self) -> Iterator[Path]:
        """The audio files that samples have Whisper features of; some more than once."""
        for line in self.lines:
            yield from self.builder.recordings(self.file[line])

    def __getitem__(self, part: MicroBatch) -> Batch | DataError:  # pyrefly: ignore[bad-override-param-name]
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

    positions = {}

    def check(line: int) -> None:
        try:
            positions[line] = len(builder.check(file[line]))
        except DataError as error:
            raise DataError(_located(file, line, error)) from error

    good, faults = usable(lines, check, file.path.name, "line", skip)
    return Samples(file, builder, tuple(good), positions), faults


def batches(
    samples: Samples, plan: StepPlan, first: int, end: int, rank: int, workers: int, pin: bool
) -> Iterator[Batch]:
    """The batches of the steps from ``first`` on, before ``end``, in order.

    ``workers`` processes read ahead; ``pin`` puts them into page-locked memory. Raises
    DataError for what the checks could not see, such as an audio file that has changed.
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
