"""Keys of short life that are valid, each with the session that it opens."""

from __future__ import annotations

import secrets
import time

from kimia_infer.serving.openai.errors import too_many
from kimia_infer.serving.realtime.config import SessionConfig

PREFIX = "ek_"

MOST = 10_000
"""Secrets that are valid at a time."""


class Secrets:
    """The secrets that are valid, each with the session that it opens."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[float, SessionConfig]] = {}

    def create(self, config: SessionConfig, seconds: int) -> tuple[str, int]:
        """A secret, and when it expires in seconds since 1970. Raises ApiError if all are taken."""
        now = time.time()
        self._known = {key: item for key, item in self._known.items() if item[0] > now}
        if len(self._known) >= MOST:
            raise too_many(f"{MOST} client secrets are valid, the most here", 60_000, "busy")
        value = PREFIX + secrets.token_urlsafe(32)
        self._known[value] = now + seconds, config
        return value, int(now + seconds)

    def find(self, value: str) -> SessionConfig | None:
        """The session that a secret opens; None if it is not valid."""
        expires, config = self._known.get(value, (0.0, None))
        return config if expires > time.time() else None
