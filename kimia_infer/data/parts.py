"""Parts of recordings: the fields that select one, and fields that would but are not read.

A text beside the whole recording, where only a part of it was meant, is a wrong pair that nobody
notices. Fields by which other tools select a part or a channel are therefore refused, not ignored.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from kimia_infer.audio.files import AudioError, Reader

PART_FIELDS = ("start", "end", "offset", "duration")

OVERSHOOT_SECONDS = 1.0
"""How far behind the end of its recording a part may end, since lists round to seconds."""

AGREEMENT_SECONDS = 0.1
"""How far ``duration`` may be from the time between ``start`` and ``end`` where all are given."""

_UNIT = (
    r"(time|timestamp|pos|position|index|idx|frame|sample)?s?"
    r"(in)?(s|secs?|seconds?|ms|msecs?|millis|milliseconds?)?"
)
_SELECTS = re.compile(
    r"(audio|wav|clip|seg|segment|chunk|cut|utt|utterance|speech|word|frame|sample|time|ts|t)?"
    rf"(begin|beg|start|onset|offset|end|stop){_UNIT}"
    r"|(audio|recording|wav)?channel(s?id|idx|index|number|selector)?"
    r"|segments?|timespan|timerange|span|crop|trim"
)
"""Names, without case and punctuation, by which other tools select what is heard."""

_MAY_SELECT = re.compile(r"from|to|t[01]|[tx]m(in|ax)")
"""Names that select something if their value is a number."""

_MAY_LIST = re.compile(r"channels|times?|timestamps?|timings|ranges?|intervals?|windows?|slice")
"""Names that select something if their value is a list."""

Seconds = Annotated[float, Field(strict=False, ge=0, allow_inf_nan=False)]


class Part(NamedTuple):
    """From ``start`` to ``end`` of a recording, in seconds."""

    start: float
    end: float


class PartFields(BaseModel):
    """The part of the recording that a row means, in seconds; the whole one without these fields.

    It is ``start`` and ``end``; or, as in the manifests of NeMo, ``offset`` and ``duration``,
    where a missing offset is 0. Fields that are empty or null count as missing.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    start: Seconds | None = None
    end: Seconds | None = None
    offset: Seconds | None = None
    duration: Seconds | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, row: Any) -> Any:
        if not isinstance(row, Mapping):
            return row
        for name, value in row.items():
            if name not in PART_FIELDS and selects_sound(name, value):
                raise ValueError(
                    f"{name}: not read, though it may select a part or channel of the recording; "
                    "give start and end, or offset and duration, in seconds, or remove it"
                )
        return {n: value for n, value in row.items() if n not in PART_FIELDS or _is_set(value)}

    @model_validator(mode="after")
    def _check_part(self) -> PartFields:
        if (self.start is None) != (self.end is None):
            raise ValueError("start, end: expected both or none")
        if self.offset is not None and self.duration is None:
            raise ValueError("offset, duration: expected an offset with a duration")
        if self.offset is not None and self.start is not None:
            raise ValueError("start, offset: expected one of them")
        if self.duration == 0:
            raise ValueError("duration: expected more than 0")
        if self.start is None or self.end is None:
            return self
        if self.end <= self.start:
            raise ValueError(
                f"start, end: expected a start before the end, found {self.start:g} and "
                f"{self.end:g} s"
            )
        between = self.end - self.start
        if self.duration is not None and abs(between - self.duration) > AGREEMENT_SECONDS:
            raise ValueError(
                f"duration: {self.duration:g} s, but from start to end it is {between:g} s; "
                "remove what is wrong"
            )
        return self

    @property
    def part(self) -> Part | None:
        if self.start is not None and self.end is not None:
            return Part(self.start, self.end)
        if self.duration is not None:
            offset = self.offset or 0.0
            return Part(offset, offset + self.duration)
        return None


def selects_sound(name: str, value: object) -> bool:
    """Whether a field says that only a part or a channel of a recording is meant."""
    plain = re.sub(r"[\W_]", "", name.lower())
    if not _is_set(value):
        return False
    if _MAY_SELECT.fullmatch(plain):
        return re.fullmatch(r"[\d.]+", str(value)) is not None
    if _MAY_LIST.fullmatch(plain):
        return isinstance(value, list)
    return plain in PART_FIELDS or _SELECTS.fullmatch(plain) is not None


def _is_set(value: object) -> bool:
    return value is not None and not (isinstance(value, str) and not value.strip())


def load_part(path: str | os.PathLike[str], sample_rate: int, part: Part) -> np.ndarray:
    """float32 [samples] of a ``part`` of an audio file; what is behind it is not decoded.

    Raises AudioError as ``load_audio`` does, and where the recording ends before the part.
    """
    waves, samples = [], 0
    blocks = Reader(path, None, sample_rate, None, lambda: None).waves()
    with contextlib.closing(blocks):
        for wave in blocks:
            waves.append(wave)
            samples += len(wave)
            if samples >= round(part.end * sample_rate):
                break
    return cut(np.concatenate(waves), sample_rate, part, os.fspath(path))


def cut(wave: np.ndarray, sample_rate: int, part: Part, name: str) -> np.ndarray:
    """The ``part`` of ``wave`` [samples], which is called ``name``.

    Raises:
        AudioError: the recording ends before the part does.
    """
    start, end = part
    piece = wave[round(start * sample_rate) : round(end * sample_rate)]
    length = len(wave) / sample_rate
    if not piece.size or end > length + OVERSHOOT_SECONDS:
        raise AudioError(
            f"{name}: the audio ends at {length:.2f} s, before {start:g} to {end:g} s are over"
        )
    return piece
