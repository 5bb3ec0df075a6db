"""Voices that callers upload: recordings, kept in memory for a while."""

from __future__ import annotations

import hashlib
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from kimia_infer.serving.openai.errors import ApiError

LARGEST = 10 << 20
"""Bytes of a recording, as in OpenAI's API; 30 s of uncompressed stereo have 5.8 MB at 48 kHz."""

KEPT = 32
"""Voices at a time; the one that was not used for longest goes first."""

KEPT_OF_OWNER = 8
"""Of these, voices of one caller."""

KEPT_SECONDS = 24 * 3600.0
"""How long a voice stays that is not used."""

LONGEST_WORDS = 2000
"""Characters of what is said in a recording."""

PREFIX = "voice_"


@dataclass
class UploadedVoice:
    """A recording that ``owner`` has sent; ``words`` are said in it, "" if that is not known."""

    id: str
    name: str
    owner: str = field(repr=False)  # a key
    content: bytes = field(repr=False)
    words: str
    created: int
    used: float

    @property
    def described(self) -> dict[str, Any]:
        """As OpenAI's API does it, and when it goes unless it is used."""
        return {
            "id": self.id,
            "object": "audio.voice",
            "name": self.name,
            "created_at": self.created,
            "type": "audio_sample",
            "expires_at": int(self.used + KEPT_SECONDS),
        }


class UploadedVoices:
    """The voices of all callers.

    An id is a hash of its owner, the recording and its words, so it tells nothing and cannot be
    guessed; who has it may use the voice, and the owner alone is shown it.
    """

    def __init__(self) -> None:
        self._voices: dict[str, UploadedVoice] = {}
        self._lock = threading.Lock()

    def add(self, owner: str, name: str, content: bytes, words: str) -> UploadedVoice:
        """Keep a recording; the same one again is the same voice."""
        parts = (owner.encode(), content, words.encode())
        digest = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts))
        now = time.time()
        voice = UploadedVoice(
            PREFIX + digest.hexdigest()[:32], name, owner, content, words, int(now), now
        )
        with self._lock:
            self._voices.pop(voice.id, None)
            self._voices[voice.id] = voice
            own = [other.id for other in self._voices.values() if other.owner == owner]
            for old in own[:-KEPT_OF_OWNER]:
                del self._voices[old]
            self._drop()
        return voice

    def find(self, name: str) -> UploadedVoice | None:
        """The voice with this id, which counts as used."""
        with self._lock:
            self._drop()
            if voice := self._voices.pop(name, None):
                voice.used = time.time()
                self._voices[name] = voice  # last, as the one that was used last
            return voice

    def owned_by(self, owner: str) -> list[UploadedVoice]:
        with self._lock:
            self._drop()
            return [voice for voice in self._voices.values() if voice.owner == owner]

    def remove(self, owner: str, name: str) -> bool:
        """Whether there was such a voice of ``owner``; it is gone now."""
        with self._lock:
            voice = self._voices.get(name)
            if voice is None or voice.owner != owner:
                return False
            del self._voices[name]
            return True

    def _drop(self) -> None:
        """Forget what is expired, and the first ones if there are too many."""
        oldest = time.time() - KEPT_SECONDS
        for name in [name for name, voice in self._voices.items() if voice.used < oldest]:
            del self._voices[name]
        while len(self._voices) > KEPT:
            del self._voices[next(iter(self._voices))]


def require_size(param: str, size: int) -> None:
    if size > LARGEST:
        text = f"{param}: larger than {LARGEST >> 20} MiB; 30 s of speech have less"
        raise ApiError(413, text, param, "too_large")
