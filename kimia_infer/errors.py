"""The errors that a caller can mend."""


class RequestError(ValueError):
    """A request cannot be served; the message names the field, the rule and the fix."""


class RequestTimeout(RequestError):
    """An answer was not complete within the time that the request allowed."""


class RequestOutOfMemory(RequestError):
    """A request needed more memory than the device has left; the next one can be served."""
