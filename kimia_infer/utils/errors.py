"""Errors that a caller can correct; the message says what is wrong and what to do."""

from __future__ import annotations


class ConfigurationError(ValueError):
    """The model cannot be set up as asked, or the device lacks what that takes."""


class RequestError(ValueError):
    """A request cannot be served; the message names the field, the rule and the fix."""


class RequestTimeout(RequestError):
    """An answer was not complete within the time that the request allowed."""


class RequestOutOfMemory(RequestError):
    """A request needed more memory than the device has left; the next one can be served."""


class WeightsError(RuntimeError):
    """The weights cannot be found, fetched or prepared; the message says what to do."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the message names the file, the tensor and the reason."""
