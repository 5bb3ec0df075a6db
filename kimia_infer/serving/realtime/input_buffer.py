"""The sound that a client has sent and that is in no item yet."""

from __future__ import annotations

from kimia_infer.serving.realtime.schema import SAMPLE_BYTES


class InputBuffer:
    """Samples by their place among all that were ever appended."""

    def __init__(self) -> None:
        self._sound = bytearray()
        self.begin = 0

    @property
    def end(self) -> int:
        """Samples that were ever appended."""
        return self.begin + len(self)

    def __len__(self) -> int:
        """Samples in the buffer."""
        return len(self._sound) // SAMPLE_BYTES

    def append(self, sound: bytes) -> None:
        self._sound += sound

    def take(self, begin: int, end: int) -> bytes:
        """The samples from ``begin`` to ``end``; they and those before leave the buffer."""
        first = max(begin, self.begin)
        found = self._sound[SAMPLE_BYTES * (first - self.begin) : SAMPLE_BYTES * (end - self.begin)]
        self.drop(end)
        return bytes(found)

    def drop(self, end: int) -> None:
        """Forget the samples before ``end``."""
        count = max(0, min(end, self.end) - self.begin)
        del self._sound[: SAMPLE_BYTES * count]
        self.begin += count
