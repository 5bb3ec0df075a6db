"""Spoken answers that later requests refer to by their id, kept for a while."""

from __future__ import annotations

import threading
import time
import uuid
from collections import OrderedDict
from dataclasses import dataclass

from kimia_infer.serving.openai.errors import ApiError

KEPT_SECONDS = 3600
MOST_REPLIES = 10_000
MOST_BYTES = 256_000_000
"""About 90 minutes of speech; the oldest replies make room for new ones."""


def new_id(kind: str) -> str:
    """An id that nobody can guess, such as ``audio_5f0c...``."""
    return f"{kind}_{uuid.uuid4().hex}"


@dataclass(frozen=True)
class Reply:
    """What was said: the words, and a wav file, None if nothing was to be heard.

    ``expires_at`` is in seconds since 1970.
    """

    id: str
    transcript: str
    wav: bytes | None
    expires_at: int


class Replies:
    """The replies of one server, in memory. Whoever knows an id may refer to it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Reply] = OrderedDict()  # the oldest first
        self._bytes = 0

    def keep(self, reply: Reply) -> None:
        with self._lock:
            self._kept[reply.id] = reply
            self._bytes += _size(reply)
            self._drop_expired()
            while self._bytes > MOST_BYTES or len(self._kept) > MOST_REPLIES:
                self._drop_oldest()

    def find(self, name: str, param: str) -> Reply:
        """The reply with the id ``name``. Raises ApiError naming ``param`` if there is none."""
        with self._lock:
            self._drop_expired()
            reply = self._kept.get(name)
        if reply is None:
            raise ApiError(
                404,
                f"{param}: there is no reply {name[:60]!r} here, or no more: replies are kept for "
                f"{KEPT_SECONDS} s at most; send its words as content instead",
                param,
                "audio_not_found",
            )
        return reply

    def _drop_expired(self) -> None:
        now = time.time()
        while self._kept and next(iter(self._kept.values())).expires_at <= now:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        _, reply = self._kept.popitem(last=False)
        self._bytes -= _size(reply)


def _size(reply: Reply) -> int:
    return len(reply.wav or b"") + len(reply.transcript.encode())
