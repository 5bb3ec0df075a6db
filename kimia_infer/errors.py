"""The error that a caller can mend."""


class RequestError(ValueError):
    """A request cannot be served; the message names the field, the rule and the fix."""
