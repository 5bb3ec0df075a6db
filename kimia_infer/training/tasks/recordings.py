"""Recordings that train the codec: found, checked before training, read while it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from pydantic import (
    AfterValidator,
    Field,
    StringConstraints,
    ValidationError,
)
from torch import Tensor

from kimia_infer.audio.files import SAMPLE_RATE, AudioError, AudioTooLong, load_audio
from kimia_infer.data.conversations import ConversationFile, DataError
from kimia_infer.data.parts import Part, PartFields, load_part
from kimia_infer.training.config import Items
from kimia_infer.training.dataset import TrainingData, split_data, usable
from kimia_infer.training.plan import MicroBatch
from kimia_infer.training.tasks.config import CodecTrainingConfig
from kimia_infer.utils.errors import explain

SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a")

Example = dict[str, Any]
"""What is read of a recording: tensors and more, always with its length in ``seconds``."""


@dataclass(frozen=True)
class Recording:
    """An audio file, or a ``part`` of one, which ``text``, ``codes`` and ``phones`` belong to.

    ``where`` names its place in the data for reports.
    """

    where: str
    path: Path
    text: str | None = None
    codes: tuple[int, ...] | None = None
    phones: tuple[tuple[str, float], ...] | None = None
    part: Part | None = None

    def load(self, sample_rate: int = SAMPLE_RATE, max_seconds: float | None = None) -> np.ndarray:
        """float32 [samples] of the part. Raises AudioError, as :func:`load_audio`."""
        if self.part is None:
            return load_audio(self.path, max_seconds, sample_rate)
        seconds = self.part.end - self.part.start
        if max_seconds is not None and seconds > max_seconds:
            raise AudioTooLong(
                f"{self.path}: a part of {seconds:g} s, longer than the permitted {max_seconds:g} s"
            )
        return load_part(self.path, sample_rate, self.part)


def find_recordings(data: Path, audio_root: Path, needs_text: bool = False) -> list[Recording]:
    """The audio files of a directory (sorted by path), a list of paths, or JSON Lines.

    A line of JSON is ``{"audio": path, "text": ..., "codes": [...], "phones": [[name, second],
    ...]}``, with the second when each phone begins; what is not needed may be missing. A line may
    mean a part of the recording, by ``start`` and ``end`` or ``offset`` and ``duration``, which
    then is what the other fields describe. Further fields are not read.

    Raises:
        DataError: there are none, or a line cannot be read; the message names it.
    """
    if data.is_dir():
        paths = sorted(p for p in data.rglob("*") if p.suffix.lower() in SUFFIXES)
        recordings = [Recording(str(path), path) for path in paths]
    elif data.suffix == ".jsonl":
        file = ConversationFile(data)
        recordings = [_recording(file.raw(i), file.where(i), audio_root) for i in range(len(file))]
    else:
        try:
            lines = enumerate(data.read_text(encoding="utf-8").splitlines(), 1)
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{data}: cannot be read as a list of paths ({error})") from error
        listed = [(f"{data}:{number}", line.strip()) for number, line in lines]
        recordings = [Recording(where, audio_root / path) for where, path in listed if path]
    if not recordings:
        raise DataError(f"{data}: no audio files ({', '.join(SUFFIXES)})")
    for recording in recordings if needs_text else ():
        if recording.text is None:
            raise DataError(
                f"{recording.where}: text: missing; texts are needed, in JSON Lines with audio"
            )
    return recordings


def _in_order(phones: tuple[tuple[str, float], ...]) -> tuple[tuple[str, float], ...]:
    if any(a[1] > b[1] for a, b in pairwise(phones)):
        raise ValueError("expected seconds that do not fall")
    return phones


NotBlank = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Phone = Annotated[tuple[NotBlank, float], Field(strict=False)]


class _Line(PartFields):
    """A line of JSON; other fields are ignored."""

    audio: NotBlank
    text: NotBlank | None = None
    codes: Items[Annotated[int, Field(ge=0)]] | None = None
    phones: Annotated[Items[Phone], AfterValidator(_in_order)] | None = None


def _recording(values: object, where: str, audio_root: Path) -> Recording:
    try:
        line = _Line.model_validate(values)
    except ValidationError as error:
        raise DataError(f"{where}: {'; '.join(explain(error))}") from error
    path = audio_root / line.audio
    return Recording(where, path, line.text, line.codes, line.phones, line.part)


@dataclass(frozen=True)
class Examples:
    """A batch of recordings, which differ in length.

    ``weights`` [batch] are the weights of their losses, ``names`` says where they come from.
    """

    items: tuple[Example, ...]
    weights: Tensor
    names: list[str]

    def to(self, device: torch.device) -> Examples:
        return replace(self, items=send_to_device(self.items, device))


@dataclass
class Recordings(TrainingData):
    """Recordings read as examples, of which the first ones stay in memory.

    Args:
        items: what is read.
        read: makes the example of a recording. Raises DataError or AudioError.
        room: seconds that may still be kept in memory.
    """

    items: Sequence[Recording]
    read: Callable[[Recording], Example]
    room: float
    kept: dict[Recording, Example] = field(default_factory=dict)
    unit = "recording"

    def example(self, recording: Recording) -> Example:
        """Raises DataError, naming the recording."""
        if recording in self.kept:
            return self.kept[recording]
        try:
            example = self.read(recording)
        except (DataError, AudioError) as error:
            raise DataError(f"{recording.where}: {error}") from error
        if example["seconds"] <= self.room:
            self.room -= example["seconds"]
            self.kept[recording] = example
        return example

    def __getitem__(self, part: MicroBatch) -> Examples:
        recordings = [self.items[index] for index in part.indices]
        items = tuple(map(self.example, recordings))
        return Examples(items, torch.tensor(part.weights), [r.where for r in recordings])


def read_samples(
    settings: CodecTrainingConfig,
    read: Callable[[Recording], Example],
    needs_text: bool = False,
) -> tuple[Recordings, Recordings | None]:
    """Training and validation data, every recording of which was read once."""
    skip = settings.bad_lines == "skip"

    def read_all(data: str) -> Recordings:
        recordings = find_recordings(Path(data), Path(settings.audio_root), needs_text)
        samples = Recordings(recordings, read, settings.cache_hours * 3600)
        samples.items = usable(recordings, samples.example, data, Recordings.unit, skip)
        return samples

    return split_data(settings, read_all)
