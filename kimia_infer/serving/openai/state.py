"""What a server remembers of its clients between requests."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from kimia_infer.serving.openai.replies import Replies
from kimia_infer.serving.openai.voice_store import UploadedVoices
from kimia_infer.serving.realtime.secret_store import Secrets


def _limiter() -> MovingWindowRateLimiter:
    return MovingWindowRateLimiter(MemoryStorage())


@dataclass(frozen=True)
class State:
    """Replies that are referred to by id, uploaded voices, client secrets, requests in a minute.

    And ``created``, when the server began, in seconds since 1970.

    It is in memory. The replicas of a cluster share one, so that any of them can answer.
    """

    replies: Replies = field(default_factory=Replies)
    voices: UploadedVoices = field(default_factory=UploadedVoices)
    secrets: Secrets = field(default_factory=Secrets)
    limiter: MovingWindowRateLimiter = field(default_factory=_limiter)
    created: int = field(default_factory=lambda: int(time.time()))
