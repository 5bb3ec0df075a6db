"""What can be wrong with weights."""

from __future__ import annotations


class WeightsError(RuntimeError):
    """The weights cannot be found, fetched or prepared; the message says what to do."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the message names the file, the tensor and the reason."""
